"""XLNet through the command line: trained in random orders, on ranks that change; measured, continued and filled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.metric_names import BITS_PER_BYTE, LOSS, VALIDATION, VALIDATION_IN_ORDER
from pretrain.report.report import write_report
from tests.pretrain.test_recurrent_run import series, trained
from tests.runs import duet

KEYS = [
    "model.architecture=two_stream",
    "data.objective=permutation",
    "model.permutation={share: 0.25, span: 3}",
    "model.layers=2",
    "engine.activation_checkpointing=true",
    "train.sample_tokens=4",
]


@pytest.fixture(scope="module")
def permuted(ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps by two ranks at stage 3, two by one at stage 1; beside it all of them by two at stage 2."""
    return trained(ranks, dataset, tmp_path_factory.mktemp("two_stream") / "run", KEYS, 3)


def test_it_learns_the_same_on_other_ranks_and_bits_are_of_the_texts_order(permuted: Path, tmp_path: Path) -> None:
    found = series(permuted, LOSS, VALIDATION, VALIDATION_IN_ORDER, BITS_PER_BYTE)
    assert [len(found[name]) for name in (LOSS, VALIDATION, VALIDATION_IN_ORDER, BITS_PER_BYTE)] == [4, 2, 2, 2]
    assert found[VALIDATION][-1].value != found[VALIDATION_IN_ORDER][-1].value
    said = duet("eval", str(permuted))
    told = dict(line.split() for line in said.stdout.splitlines())
    assert float(told[VALIDATION]) == pytest.approx(found[VALIDATION][-1].value, abs=1e-4)
    assert float(told[BITS_PER_BYTE]) == pytest.approx(found[BITS_PER_BYTE][-1].value, abs=1e-4)
    assert "Validation in the text's own order" in write_report([permuted], tmp_path / "report").read_text().replace(
        "&#x27;", "'"
    )


def test_texts_are_continued_and_gaps_filled_by_the_run_and_its_export(permuted: Path, tmp_path: Path) -> None:
    assert duet("checkpoint", "export", str(permuted), "--to", str(tmp_path / "export")).returncode == 0
    continued, filled = [], []
    for of in (str(permuted), str(tmp_path / "export")):
        said = duet("generate", of, "--prompt", "You may", "--tokens", "6", "--greedy", "--json")
        continued.append(json.loads(said.stdout)["text"])
        said = duet("generate", of, "--fill", "--prompt", "<gap:2>ou may <gap:3>t", "--prompt", "a<gap:1>", "--json")
        assert said.returncode == 0, said.stderr
        filled.append([json.loads(line) for line in said.stdout.splitlines()])
    assert continued[0] == continued[1] and filled[0] == filled[1]
    assert [[len(gap) for gap in text["gaps"]] for text in filled[0]] == [[2, 3], [1]]
    assert "ou may " in filled[0][0]["text"] and "<gap" not in filled[0][0]["text"]
    shown = duet("generate", str(permuted), "--fill", "--prompt", "a<gap:1>", "--seed", "1")
    assert shown.stdout.rstrip("\n") == filled[0][1]["text"]  # the second of two draws from the next seed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "You may"], "'You may' marks no gap; write <gap:5>"),
        (["--prompt", "<gap:0>a"], "marks no gap"),
        (["--prompt", "<gap:3>"], "has gaps alone"),
        (["--prompt", "a<gap:99>"], "has 100 tokens with its gaps, and a model of model.context=16"),
        (["--prompt", "a<gap:1>", "--tokens", "3"], "gaps say how long they are; leave --tokens"),
    ],
)
def test_what_cannot_be_filled_is_refused(permuted: Path, words: list[str], message: str) -> None:
    said = duet("generate", str(permuted), "--fill", *words)
    assert (said.returncode, said.stdout) == (2, "")
    assert message in said.stderr


def test_a_model_that_reads_from_the_left_fills_nothing(run: Path) -> None:
    said = duet("generate", str(run), "--fill", "--prompt", "a<gap:1>")
    assert said.returncode == 2
    assert "--fill: parallel_encoder_decoder was not trained to know what stands behind a gap" in said.stderr
