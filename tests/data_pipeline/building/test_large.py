"""Large and many: memory and order hold at the sizes that users have."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.building.api import build
from data_pipeline.inspection.statistics import documents
from data_pipeline.storage.dataset import Dataset
from tests.corpora import corpora
from tests.data_pipeline.building.test_build import subprocess_build, texts
from tests.data_pipeline.conftest import PEAK, config, prose


@pytest.mark.drill
def test_a_document_of_100_mb_takes_the_memory_of_one_of_50(tmp_path: Path) -> None:
    paragraph = prose(20_000, 3).encode()
    peaks = []
    for size in (50_000_000, 100_000_000):  # both fill the buffers of the shuffle
        file = tmp_path / f"{size}.txt"
        file.write_bytes(paragraph * (size // len(paragraph)))
        settings = config(
            tmp_path / f"d{size}",
            file,
            tokenizer={"vocab_size": 400, "character_coverage": 0.999, "sample_bytes": 200_000},
            shard_tokens=16 * 2**20,
            duplicates={"rule": "exact"},
            shuffle=True,
        )
        output, errors = subprocess_build(settings, PEAK).communicate(timeout=1200)
        assert not errors
        peaks.append(int(output.split()[-1]) / 1024)
    dataset = Dataset.open(tmp_path / "d100000000")
    dataset.verify()
    (rows,) = documents(dataset, "train")
    whole = dataset.tokenizer().decode(np.concatenate(rows))
    assert (tmp_path / "100000000.txt").read_text().startswith(whole)
    sys.stdout.write(f"peaks in MiB: {peaks}\n")
    assert peaks[1] - peaks[0] < 25, peaks


@pytest.mark.drill
@pytest.mark.parametrize("shuffle", [False, True])
def test_57603_poems_come_back(tmp_path: Path, shuffle: bool) -> None:
    lines = gzip.decompress(corpora("tang/tang_poems.jsonl.gz").read_bytes()).decode().splitlines()
    poems = [json.loads(line)["text"] for line in lines]
    (tmp_path / "tang.jsonl").write_text("\n".join(lines))
    settings = config(
        tmp_path / "d",
        tmp_path / "tang.jsonl",
        tokenizer={"type": "bpe", "vocab_size": 4000, "character_coverage": 0.98},
        split={"rule": "hash", "fraction": 0.05},
        shard_tokens=500_000,
        shuffle=shuffle,
    )
    built = build(settings, processes=2)
    assert sum(built.sources[0].split_documents.values()) == len(poems) == 57_603
    found = texts(Dataset.open(tmp_path / "d"))
    assert sorted(found["train"] + found["validation"]) == sorted(poems)
    held = set(found["validation"])
    assert (found["train"] == [poem for poem in poems if poem not in held]) != shuffle
