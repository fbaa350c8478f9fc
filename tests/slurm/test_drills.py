"""The promise on a real Slurm: whatever befalls a job, its run goes on from the newest checkpoint, bit for bit."""

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.runs import attempts
from tests.slurm.cluster import Cluster
from tests.slurm.drills import Drill, arguments, check_close

Ranks = Callable[..., list[Any]]
Reference = Callable[..., Path]


@pytest.fixture(scope="session")
def reference(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """reference(world, *settings) -> the journal of a run that was never interrupted, without Slurm."""

    @cache
    def journal(world: int, *more: str) -> Path:
        run_dir = tmp_path_factory.mktemp("reference") / "run"
        ranks("tests.distributed.cases:train_run", world, args=arguments(dataset, run_dir, *more))
        return run_dir / "metrics.jsonl"

    return journal


@pytest.fixture(scope="module")
def interrupted(slurm: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """A run that waits, queued again after the planned signal."""
    raise NotImplementedError


def test_a_rank_that_is_killed(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(12, rank=1)
    drill.submit()
    drill.wait_held(12, rank=1)
    drill.kill(rank=1)
    drill.wait_queued_again()
    drill.wait_ended()
    drill.check("SIGKILL of one rank in a step", reference(2))
