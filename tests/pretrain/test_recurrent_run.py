"""Runs whose tokens halt, or come one after the other: from training over ranks to the page of a text."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from model.generation.inspection import inspect
from pretrain.export.use import open_trained
from pretrain.metric_names import (
    BITS_PER_BYTE,
    LOSS,
    PONDER,
    PONDER_SHARE,
    PONDER_STEPS,
    PONDER_WEIGHT,
    VALIDATION_PONDER,
)
from pretrain.report.report import write_report
from pretrain.run import journal
from pretrain.run.run_folder import RunFolder
from tests.runs import SMALL

TRAIN = "tests.distributed.cases:train_run"
HALTING = [
    "model.architecture=decoder_only",
    "model.learned_dropout.enabled=false",
    "model.recurrence={steps: 3, halt: true, halt_bias: 0, ponder: {start_step: 2, ramp_steps: 0, weight: 0.5}}",
]


def duet(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


FEEDBACK = [
    "model.architecture=feedback",
    "model.learned_dropout.enabled=false",
    "model.layers=2",
    "model.memory=7",
    "engine.activation_checkpointing=true",
]


def trained(ranks: Callable[..., list[Any]], dataset: Path, folder: Path, keys: list[str], stage: int) -> Path:
    """Two steps by two ranks at a stage, two by one rank at stage 1; beside it two ranks at one more, in one go."""
    keys = [*SMALL, *keys, f"data.path={dataset}", "train.steps=4", "train.eval_every=2"]
    ours = [*keys, f"run.dir={folder}"]
    ranks(TRAIN, 2, args=[*ours, f"engine.zero_stage={stage}"], signal_at=[2, signal.SIGTERM])
    ranks(TRAIN, 1, args=[*ours, "engine.zero_stage=1"])
    ranks(TRAIN, 2, args=[*keys, f"run.dir={folder.with_name('whole')}", f"engine.zero_stage={2 if stage == 3 else 0}"])
    return folder


def series(folder: Path, *names: str) -> dict[str, list[journal.Point]]:
    """The journal, which is that of the run beside it in these metrics."""
    found, whole = (journal.series(journal.read(RunFolder(of).journal)) for of in (folder, folder.with_name("whole")))
    for name in names:
        ours, theirs = ([point.value for point in of[name]] for of in (found, whole))
        assert ours == pytest.approx(theirs, rel=1e-4), name
    return found


@pytest.fixture(scope="module")
def halting(ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(ranks, dataset, tmp_path_factory.mktemp("halting") / "run", HALTING, 3)


def test_it_goes_on_with_other_ranks_and_tells_the_steps_that_tokens_take(halting: Path) -> None:
    found = series(halting, LOSS, PONDER, PONDER_STEPS, VALIDATION_PONDER)
    assert [point.value for point in found[PONDER_WEIGHT]] == [0.0, 0.5, 0.5, 0.5]
    shares = [found[PONDER_SHARE.of(str(n))][-1].value for n in (1, 2, 3)]
    assert sum(shares) == pytest.approx(1)
    assert found[PONDER_STEPS][-1].value == pytest.approx(sum(n * share for n, share in enumerate(shares, 1)))
    assert found[PONDER][-1].value > found[PONDER_STEPS][-1].value
    page = write_report([halting], None).read_text()
    assert "Steps a token takes" in page and "Tokens by the steps they take" in page


def test_feedback_goes_on_with_other_ranks_and_writes_a_page_without_attention(
    ranks: Callable[..., list[Any]], dataset: Path, tmp_path: Path
) -> None:
    run = trained(ranks, dataset, tmp_path / "run", FEEDBACK, 2)
    series(run, LOSS, BITS_PER_BYTE)
    duet("checkpoint", "export", run, "--to", tmp_path / "export")
    words = ["generate", "--prompt", "You may", "--prompt", "A", "--tokens", 6, "--greedy", "--html"]
    for of in (run, tmp_path / "export"):
        duet(*words, of.with_suffix(".html"), of)
    one, other = (of.with_suffix(".html").read_text() for of in (run, tmp_path / "export"))
    assert one == other and '"maps": {}' in one


def test_a_text_tells_its_steps_and_an_export_makes_the_same_one(halting: Path, tmp_path: Path) -> None:
    duet("checkpoint", "export", halting, "--to", tmp_path / "export")
    words = ["generate", "--prompt", "You may", "--tokens", 6, "--greedy", "--json"]
    one, other = (json.loads(duet(*words, of)) for of in (halting, tmp_path / "export"))
    assert one["text"] == other["text"]
    away = one["inspected_from"]
    ids = torch.tensor([token["id"] for token in one["tokens"][away:]])
    taken = inspect(open_trained(halting).model, ids).steps
    assert taken is not None and one["steps"] == other["steps"] == [None] * away + taken.tolist()
