"""Vectors of texts: means over tokens, the same alone as together, from any architecture."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_pipeline.errors import ConfigError, DataError
from model.architectures.registry import ARCHITECTURES
from model.batch import Batch
from pretrain.inference.embedding import read_texts, vectors
from pretrain.inference.trained import Trained
from tests.model.helpers import VOCABULARY, build, one_of, open_masks
from tests.runs import duet

TEXTS = ["abc", "b", "hello there", "cab", "a text that is longer than any context here", "abd"]


def tokens(texts: list[str]) -> list[np.ndarray]:
    return [np.array([ord(character) % VOCABULARY for character in text], np.int32) for text in texts]


def trained(architecture: str) -> Any:
    model = open_masks(build(one_of(architecture))).eval()
    return Trained(model, SimpleNamespace(encode=tokens), "causal", "run", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_has_the_vector_that_it_has_alone(architecture: str) -> None:
    of = trained(architecture)
    together = vectors(of, TEXTS, 4)
    assert together.dtype == np.float32
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(vectors(of, [text], 1)[0], vector, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors(of, TEXTS, 4, normalised=True), axis=1), 1, atol=1e-6)
    assert np.ptp(together, axis=0).max() > 1e-2


def test_it_is_the_mean_over_tokens_and_parts() -> None:
    """By another way: side by side with padding, which the encoder is kept from."""
    of = trained("encoder_only")
    context = of.model.config.context
    parts = [(n, ids[at : at + context]) for n, ids in enumerate(tokens(TEXTS)) for at in range(0, len(ids), context)]
    assert len(parts) > len(TEXTS)
    ids = np.zeros((len(parts), context), np.int64)
    padding = np.ones_like(ids, bool)
    for row, (_, part) in enumerate(parts):
        ids[row, : len(part)], padding[row, : len(part)] = part, False
    given, behind = torch.from_numpy(ids), torch.from_numpy(padding)
    batch = Batch(given, given, torch.arange(len(ids)), torch.tensor(1), 0, segment_ids=-behind.long(), padding=behind)
    with torch.no_grad():
        states = of.model.hidden(given, None, batch).x.masked_fill(behind[..., None], 0).sum(1).numpy()
    wanted = [sum(states[row] for row, (n, _) in enumerate(parts) if n == number) for number in range(len(TEXTS))]
    np.testing.assert_allclose(vectors(of, TEXTS, 4), np.stack(wanted) / [[len(text)] for text in TEXTS], atol=1e-5)


def test_vectors_of_a_run_in_each_form(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("You may\nthe Work\n")
    texts = ["You may", "the Work"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in texts))
    for of, given, to in (
        (run, "texts.txt", "a.npy"),
        (exported, "texts.jsonl", "a.arrow"),
        (run, "texts.txt", "a.jsonl"),
    ):
        done = duet("embed", str(of), str(tmp_path / given), "--to", str(tmp_path / to), "--text-key", "said")
        assert done.returncode == 0, done.stderr
        assert "2 vectors of" in done.stdout
        assert "Warning" not in done.stderr
    table = pa.ipc.open_file(tmp_path / "a.arrow").read_all()
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    found = [
        np.load(tmp_path / "a.npy"),
        np.array(table["vector"].to_pylist(), np.float32),
        np.array([json.loads(line)["vector"] for line in lines], np.float32),
    ]
    assert found[0].shape[0] == 2
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert np.array_equal(found[2], found[0])


def test_what_has_no_vector_is_said(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match="line 2: no text"):
        read_texts(tmp_path / "texts.txt", "text")
    with pytest.raises(ConfigError, match="no such file"):
        read_texts(tmp_path / "none.txt", "text")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="from lines or from JSON Lines"):
        read_texts(tmp_path / "table.parquet", "text")
