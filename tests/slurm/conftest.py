"""A real Slurm of four nodes; without its programs these tests are skipped, or fail under DUET_REQUIRE_SLURM."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.drills import arguments


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if absent := missing():
        give_up = pytest.fail if os.environ.get("DUET_REQUIRE_SLURM") else pytest.skip
        give_up(f"no {', '.join(absent)} here; `make system-deps` installs Slurm and munge")
    with tempfile.TemporaryDirectory(prefix="duet-slurm-") as folder:  # pytest's own are too private for munged
        cluster = Cluster(Path(folder), nodes=4, gpus=2)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The same, without jobs before and after the test, and with all nodes in service."""
    yield slurm
    slurm.cancel_all()
    slurm.start_nodes()


@pytest.fixture(scope="session")
def reference(
    ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """reference(world, *settings) -> the journal of a drill's run that nothing befell, made without Slurm."""

    @cache
    def journal(world: int, *more: str) -> Path:
        run_dir = tmp_path_factory.mktemp("reference") / "run"
        ranks("tests.distributed.cases:train_run", world, args=arguments(dataset, run_dir, *more))
        return run_dir / "metrics.jsonl"

    return journal


@pytest.fixture
def commands(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slurm's commands mean the test cluster, and one stands in a folder of one's own."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.chdir(tmp_path)
