"""The promise on a real Slurm: whatever befalls a job, its run goes on from the newest checkpoint, bit for bit."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.run_listing import recorded_end
from tests.ports import free_port
from tests.runs import ROOT, attempts
from tests.slurm.cluster import Cluster
from tests.slurm.drills import TRAINER, Drill, check_close
from tests.slurm.processes import programs, signal_all, wait_until

Reference = Callable[..., Path]
WITH_NOISE, WITHOUT_NOISE = 1e-3, 1e-5
SOFT = "model.learned_dropout.rounding=none"
"""Nothing is rounded at random: after a change of the number of ranks only the order of sums is another one."""


@pytest.fixture(scope="module")
def stopped(slurm: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Drill, Path]:
    """A job on two nodes that the planned signal stopped in step 7 and that is queued again; a copy of its run."""
    folder = tmp_path_factory.mktemp("stopped")
    drill = Drill(slurm, folder, dataset, warm=True)
    drill.report_slowly(3, patience=1)
    drill.hold(7)
    drill.hold(17, rank=1, restart=1)
    drill.submit()
    drill.wait_held(7)
    drill.planned_signal()
    drill.wait_queued_again()
    return drill, shutil.copytree(drill.run_dir, folder / "copy")


def test_the_planned_signal_then_a_killed_rank(
    cluster: Cluster, stopped: tuple[Drill, Path], reference: Reference
) -> None:
    drill, _ = stopped
    drill.wait_held(17, rank=1, restart=1)
    assert not (drill.run_dir / "report.html").exists(), "nodes that are wanted draw no pictures"
    drill.kill(rank=1)
    drill.wait_queued_again(2)
    drill.wait_ended()
    assert drill.on_disk[0] == 7
    drill.check("planned signal; SIGKILL of rank 1 in a step", reference(2), stops=[7])
    assert (drill.run_dir / "report.html").exists(), "srun would wait for a second; the other rank waited for rank 0"
    assert drill.said().count("policy: done: all ranks ended well") == 0
    assert "policy: done: the run is over and saved: all steps done" in drill.said()


def test_from_two_nodes_to_one(
    cluster: Cluster, stopped: tuple[Drill, Path], dataset: Path, reference: Reference, tmp_path: Path
) -> None:
    _, run_dir = stopped
    drill = Drill(cluster, tmp_path, dataset, run_dir=run_dir, warm=True)
    drill.submit(nodes=1)
    drill.wait_ended()
    check_close(drill.journal, reference(2), WITH_NOISE)


@pytest.mark.drill
def test_the_planned_signal_twice(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.hold(13, rank=1, restart=1)
    drill.submit()
    for restart, step in enumerate((7, 13)):
        drill.wait_held(step, rank=restart, restart=restart)
        drill.planned_signal()
        drill.wait_queued_again(restart + 1)
    drill.wait_ended()
    assert drill.on_disk == [7, 13]
    drill.check("planned signal, twice", reference(2), stops=[7, 13])


@pytest.mark.drill
def test_the_time_limit(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """Slurm itself sends the planned signal, 300 s before the limit as the script asks, or up to a minute earlier."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.submit(2, "--time=6")
    drill.wait_held(7)
    drill.wait_queued_again()
    drill.wait_ended()
    assert drill.on_disk == [7]
    drill.check("time limit", reference(2), stops=[7])


@pytest.mark.drill
def test_a_report_of_90_seconds(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """Longer than srun waits for a rank, and than the planned signal leaves if Slurm sends it as late as it may."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.report_slowly(90)
    drill.hold(7)
    drill.submit(2, "--time=2", "--signal=B:USR1@60")
    drill.wait_held(7)
    drill.wait_queued_again()
    cluster.run("scontrol", "update", f"jobid={drill.job}", "timelimit=10")
    drill.wait_ended()
    assert (drill.run_dir / "report.html").exists()
    drill.check("time limit; a report of 90 s", reference(2), stops=[7])


@pytest.mark.drill
@pytest.mark.parametrize("killed", [False, True])
def test_a_report_of_90_seconds_under_srun_alone(cluster: Cluster, dataset: Path, tmp_path: Path, killed: bool) -> None:
    """By hand, without the batch script; in the end rank 0 may be killed at its report."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.report_slowly(90)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = ["srun", "--wait=60", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-P", "-m", TRAINER]
    began = time.monotonic()
    step = subprocess.Popen([*command, *drill.arguments], env=cluster.environment | drill.environment() | where)
    if killed:
        wait_until(lambda: recorded_end(drill.run_dir) is not None, 120, "the end")
        pids = programs(cluster.name, TRAINER, SLURM_PROCID=0)
        signal_all(pids, signal.SIGKILL)
    code = step.wait(300)
    end = recorded_end(drill.run_dir)
    assert end
    assert end.finished
    assert code == (137 if killed else 0)
    assert (drill.run_dir / "report.html").exists() != killed
    print(f"drill: srun alone, report of 90 s{', killed' if killed else ''}: {time.monotonic() - began:.0f} s")


@pytest.mark.drill
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path, rank: int) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(12, rank)
    drill.submit()
    drill.wait_held(12, rank)
    drill.kill(rank)
    drill.wait_queued_again()
    drill.wait_ended()
    drill.check(f"SIGKILL of rank {rank} in a step", reference(2))


@pytest.mark.drill
@pytest.mark.parametrize(
    ("rank", "phase", "newest"),
    [
        (1, "before the shards", 5),
        (0, "between shards", 5),
        (0, "before the manifest", 5),
        (0, "after the manifest", 10),
        (0, "in retention", 10),
    ],
)
def test_a_rank_is_killed_while_it_saves(
    cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path, rank: int, phase: str, newest: int
) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.fail(10, rank, restart=0, phase=phase)
    drill.submit()
    drill.wait_queued_again()
    drill.wait_ended()
    assert drill.on_disk == [newest]
    drill.check(f"SIGKILL of rank {rank} {phase} of a save", reference(2))


@pytest.mark.drill
def test_a_rank_hangs(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """Its peer waits in a collective, which has a time limit, and leaves its stacks in the run folder."""
    drill = Drill(cluster, tmp_path, dataset, "engine.timeout_minutes=0.3")
    drill.hold(12, rank=1)
    drill.submit()
    drill.wait_held(12, rank=1)
    drill.kill(1, signal.SIGSTOP)
    drill.wait_queued_again()
    drill.wait_ended()
    assert list((drill.run_dir / "logs").glob("stacks-rank-0-*"))
    drill.check("SIGSTOP of rank 1 (engine.timeout_minutes=0.3)", reference(2))


@pytest.mark.drill
def test_a_crash_loop_ends(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """The same bug at the same step, whenever it is tried."""
    drill = Drill(cluster, tmp_path, dataset)
    for restart in range(9):
        drill.fail(8, 1, restart, error="a bug")
    drill.submit()
    drill.wait_queued_again()
    drill.wait_ended("FAILED")
    assert [resumed_from for resumed_from, _ in attempts(drill.journal)] == [None, 5]
    assert "the same failure twice at step 8, in restart 0 and now: RuntimeError: a bug (rank 1 on n2" in drill.said()


@pytest.mark.drill
@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("noise", [True, False])
def test_on_another_number_of_nodes(
    cluster: Cluster,
    ranks: Callable[..., list[Any]],
    dataset: Path,
    reference: Reference,
    tmp_path: Path,
    nodes: int,
    noise: bool,
) -> None:
    more = () if noise else (SOFT,)
    drill = Drill(cluster, tmp_path, dataset, *more)
    ranks("tests.distributed.cases:train_run", 2, args=drill.arguments, signal_at=[10, int(signal.SIGUSR1)])
    drill.submit(nodes)
    drill.wait_ended()
    same = nodes == 2
    worst = check_close(drill.journal, reference(2, *more), 0.0 if same else WITH_NOISE if noise else WITHOUT_NOISE)
    print(f"drill: from 2 nodes to {nodes}, {'with' if noise else 'without'} noise: losses differ by up to {worst:.1e}")
