"""Whole runs with other objectives than the next token, through the command line."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from pretrain.journal import read
from pretrain.use import generate_text
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
        ("encoder_only", "masked", "no next token to draw"),
        ("encoder_decoder", "span_corruption", "not to continue a prompt"),
    ],
)
def test_a_model_of_another_objective_is_trained_and_validated(
    marked_dataset: Path, tmp_path: Path, architecture: str, objective: str, reason: str
) -> None:
    folder = tmp_path / "run"
    found = run(marked_dataset, folder, f"model.architecture={architecture}", f"data.objective={objective}")
    assert len(found) == 2
    assert all("loss/val_bits_per_byte" not in metrics for metrics in found)
    assert not [r for r in read(folder / "metrics.jsonl") if r.kind == "sample"]
    with pytest.raises(ConfigError, match=reason):
        next(generate_text(folder, None, "", tokens=1, temperature=0.0, top_k=None, seed=0))
    if architecture == "encoder_decoder":
        again = duet("eval", str(folder))
        assert f"{'loss/val':<28} {found[-1]['loss/val']:.6f}" in again.stdout, again.stderr


def test_a_causal_model_minds_documents(dataset: Path, tmp_path: Path) -> None:
    found = run(dataset, tmp_path / "run", "model.document_mask=true")
    assert len(found) == 2
    assert all("loss/val_bits_per_byte" not in metrics for metrics in found)
