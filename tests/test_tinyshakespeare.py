"""The figures of docs/results.md, trained anew: `make drills` (about 25 minutes on 2 cores)."""

import re
from pathlib import Path
from statistics import mean

import pytest

from tests.corpora import corpora
from tests.runs import duet

SEEDS = (1, 2, 3)
CASES = [
    ("model/decoder-4", 1.92, None),
    ("model/parallel-2", 1.935, None),
    ("model/parallel-3-learned-dropout", 1.95, 0.6),
]
"""Preset, largest mean validation loss (nats a character), largest gate density of any seed."""

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tinyshakespeare") / "data"
    text = corpora("tinyshakespeare/input.txt")
    done = duet("data", "build", "data/characters", f"data.sources.text.paths=[{text}]", f"data.path={path}")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize(("preset", "loss", "density"), CASES)
def test_presets_reach_their_losses(
    dataset: Path, tmp_path: Path, preset: str, loss: float, density: float | None
) -> None:
    losses = []
    for seed in SEEDS:
        run = ["data/characters", preset, "run/tinyshakespeare", f"data.path={dataset}", f"run.seed={seed}"]
        done = duet("train", *run, f"run.dir={tmp_path / str(seed)}", "tracking.mode=off", timeout=3600)
        assert done.returncode == 0, done.stderr
        last = done.stdout[done.stdout.rindex("validation   loss") :].splitlines()[0]
        print(preset, seed, last)
        losses.append(float(re.search(r"loss ([\d.]+)", last)[1]))  # type: ignore[index]
        if density is not None:
            assert 0 < float(re.search(r"density ([\d.]+)", last)[1]) <= density  # type: ignore[index]
    assert mean(losses) <= loss, losses
