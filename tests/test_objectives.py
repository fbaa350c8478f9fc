"""Whole runs with other objectives than the next token, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.generation.sampling import Sampling
from pretrain.engine.buffers import persistent_buffers
from pretrain.export.portable import load_export, write_export
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.trained import find_checkpoint
from pretrain.run.journal import read
from tests.runs import SMALL, attempts, duet

STEPS = ["train.steps=4", "train.eval_every=2", "train.checkpoint_every=2", "train.sample_tokens=5"]


def run(dataset: Path, folder: Path, *args: str) -> list[dict[str, float]]:
    """Train for four steps; the validations' metrics."""
    done = duet("train", *SMALL, *args, *STEPS, f"data.path={dataset}", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    [(_, steps)] = attempts(folder / "metrics.jsonl")
    assert list(steps) == [1, 2, 3, 4]
    return [r.metrics for r in read(folder / "metrics.jsonl") if "loss/val" in r.metrics]


@pytest.mark.parametrize(
    ("architecture", "objective", "reason"),
    [
        pytest.param("encoder_only", "masked", "no next token to draw", marks=pytest.mark.drill),
        ("encoder_decoder", "span_corruption", "not to continue a prompt"),
    ],
)
def test_a_model_of_another_objective_is_trained_and_validated(
    marked_dataset: Path, tmp_path: Path, architecture: str, objective: str, reason: str
) -> None:
    """The encoder of two sequences with statistics of batches, which are then read from the checkpoint."""
    folder = tmp_path / "run"
    norm = "batchnorm" if architecture == "encoder_decoder" else "layernorm"
    model = [f"model.architecture={architecture}", f"model.norm={norm}"]
    found = run(marked_dataset, folder, *model, f"data.objective={objective}")
    assert len(found) == 2
    assert all("loss/val_bits_per_byte" not in metrics for metrics in found)
    assert not [r for r in read(folder / "metrics.jsonl") if r.kind == "sample"]
    with pytest.raises(ConfigError, match=reason):
        Continuation(open_trained(folder), [""], Settings(Sampling()))
    if architecture == "encoder_decoder":
        again = duet("eval", str(folder))
        assert f"{'loss/val':<28} {found[-1]['loss/val']:.6f}" in again.stdout, again.stderr
        checkpoint, config = find_checkpoint(folder)
        write_export(checkpoint, config, tmp_path / "exported", "bf16")
        exported = load_export(tmp_path / "exported")
        buffers = persistent_buffers(exported.model)
        assert buffers
        assert all(torch.equal(buffers[name], values) for name, values in checkpoint.buffers().items())


@pytest.mark.parametrize(
    ("marked", "model"),
    [
        (False, ["model.document_mask=true"]),
        (True, ["model.architecture=encoder_decoder", "data.objective=span_corruption"]),
        (False, ["model.architecture=draft_and_verify", "data.objective=continuation"]),
    ],
)
def test_other_ranks_and_stages_learn_the_same(
    ranks: Callable[..., list[Any]], dataset: Path, marked_dataset: Path, tmp_path: Path, marked: bool, model: list[str]
) -> None:
    args = [*SMALL, *STEPS, *model, f"data.path={marked_dataset if marked else dataset}"]
    case = "tests.distributed.cases:train_run"
    ranks(case, 1, args=[*args, f"run.dir={tmp_path / 'one'}", "engine.zero_stage=1"])
    ranks(case, 2, args=[*args, f"run.dir={tmp_path / 'two'}", "engine.zero_stage=3", "batch.micro_batch=2"])
    one, two = (list(read(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    for loss, count in (("loss/train", 4), ("loss/val", 2)):
        mine, others = ([r.metrics[loss] for r in run if loss in r.metrics] for run in (one, two))
        assert len(mine) == count
        assert others == pytest.approx(mine, abs=1e-4)
    assert not any("loss/val_bits_per_byte" in r.metrics for r in one)
