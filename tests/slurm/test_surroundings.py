"""Drills of what is around a run: nodes, scheduler, disk, tracking server, a second job, edits of the code."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.run.journal import read
from pretrain.run.provenance import MODULE, PACKAGES
from pretrain.tracking.follower import sync
from tests.faults.tracked import Server, assert_mirrors
from tests.runs import ROOT, newest_on_disk
from tests.slurm.cluster import Cluster
from tests.slurm.drills import Drill

pytestmark = pytest.mark.drill
Reference = Callable[..., Path]


def test_preemption(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.submit()
    drill.wait_held(7)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text(f"#!/bin/bash\nuntil [ -e {tmp_path}/enough ]; do sleep 0.1; done\n")
    job = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", str(urgent)
    ).strip()
    cluster.wait_for_job(job, "RUNNING")
    (tmp_path / "enough").touch()
    cluster.wait_for_job(job, "COMPLETED")
    drill.wait_queued_again()
    drill.wait_ended()
    assert drill.on_disk == [7], "it saved when it was told to go"
    drill.check("preemption", reference(2), stops=[7])


@pytest.mark.parametrize(("rank", "told"), [(0, True), (1, True), (1, False)])
def test_a_node_is_lost(
    cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path, rank: int, told: bool
) -> None:
    """Rank 0's runs the batch script, too. When Slurm is not `told`, the job may first be started there once more."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(12, rank=rank)
    drill.submit()
    drill.wait_held(12, rank=rank)
    node = f"n{rank + 1}"
    cluster.kill_node(node, tell=told)
    drill.wait_queued_again()
    drill.wait_ended()
    assert node not in drill.nodes(restart=int(cluster.job(drill.job)["Restarts"]))
    drill.check(f"node of rank {rank} killed{'' if told else ', Slurm does not know'}", reference(2))


def test_a_node_is_dead_at_launch(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """Slurm believes for a while that it is there; the job avoids it from then on."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.submit()
    drill.wait_held(7)
    drill.planned_signal()
    drill.wait_queued_again(start=False)
    cluster.kill_node("n2", tell=False)
    cluster.start_now(drill.job)
    drill.wait_queued_again(2)
    drill.wait_ended()
    assert "n2 did not start its tasks" in drill.said()
    assert "n2" not in drill.nodes(restart=2)
    assert drill.on_disk.pop() == 7, "nothing was trained in the start between"
    drill.check("node dead at launch", reference(2), stops=[7])


def test_the_controller_is_restarted(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.submit()
    drill.wait_held(7)
    cluster.restart_controller()
    drill.planned_signal()
    drill.wait_queued_again(start=False)
    cluster.restart_controller()
    cluster.start_now(drill.job)
    drill.wait_ended()
    drill.check("controller restarted, twice; planned signal", reference(2), stops=[7])


def test_cancelled_stays_cancelled(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """And what was saved then is there for a new job."""
    drill = Drill(cluster, tmp_path, dataset)
    drill.hold(7)
    drill.submit()
    drill.wait_held(7)
    cluster.run("scancel", drill.job)
    drill.wait_ended("CANCELLED")
    first = drill.job
    drill.submit()
    drill.wait_ended()
    assert (cluster.job(first)["JobState"], cluster.job(first)["Restarts"]) == ("CANCELLED", "0")
    assert drill.on_disk == [7]
    drill.check("scancel; a new job", reference(2), stops=[7])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_disk_is_full_at_a_checkpoint(
    cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path, small_disk: Path
) -> None:
    """The job ends with a word about it, and is not tried again until there is space."""
    drill = Drill(cluster, tmp_path, dataset, run_dir=small_disk / "run")
    drill.hold(9)
    drill.submit()
    drill.wait_held(9)
    filler = small_disk / "filler"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(bytes(free - 40_000))  # a shard has more
    drill.go(9)
    drill.wait_ended("FAILED")
    said = drill.said()
    assert "the checkpoint could not be written" in said
    assert "No space left on device" in said
    assert "policy: stop: another try cannot mend it" in said
    assert "Traceback" not in said
    assert newest_on_disk(drill.run_dir) == 5
    filler.unlink()
    drill.submit()
    drill.wait_ended()
    drill.check("disk full at a checkpoint; a new job", reference(2))


def test_the_tracking_server_is_down_at_the_requeue(
    cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path
) -> None:
    server = Server(tmp_path / "server")
    server.start()
    drill = Drill(cluster, tmp_path / "job", dataset, "tracking.mode=online", f"tracking.uri={server.uri}")
    try:
        drill.hold(7)
        drill.submit()
        drill.wait_held(7)
        drill.planned_signal()
        drill.wait_queued_again(start=False)
        server.kill()
        cluster.start_now(drill.job)
        drill.wait_ended()
        told = [record.fields["text"] for record in read(drill.journal) if record.kind == "warning"]
        assert any("MLflow" in text for text in told)
        server.start()
        sync(drill.run_dir)
        assert assert_mirrors(drill.run_dir) > 0
    finally:
        server.kill()
    drill.check("MLflow down at the requeue", reference(2), stops=[7])


def test_two_jobs_on_one_run_folder(cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    """The second one refuses and names the first, which it does not disturb."""
    first = Drill(cluster, tmp_path / "first", dataset, run_dir=tmp_path / "run")
    first.hold(7)
    first.submit()
    first.wait_held(7)
    second = Drill(cluster, tmp_path / "second", dataset, run_dir=tmp_path / "run")
    second.submit()
    second.wait_ended("FAILED")
    assert f"another start owns this run folder (attempt 1: job {first.job}, process" in second.said()
    assert "Traceback" not in second.said()
    first.planned_signal()
    first.wait_queued_again()
    first.wait_ended()
    first.check("a second job on the run folder; planned signal", reference(2), stops=[7])


def test_code_is_edited_between_submission_and_requeue(
    cluster: Cluster, dataset: Path, reference: Reference, tmp_path: Path
) -> None:
    """The job runs a copy of the code as it was when it was submitted, what git does not know included."""
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / MODULE, checkout)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", checkout, *command.split()], check=True)
    trainer = checkout / "pretrain" / "trainer.py"
    trainer.write_text(trainer.read_text() + "\nfrom pretrain import untracked  # noqa\n")
    (checkout / "pretrain" / "untracked.py").touch()
    drill = Drill(cluster, tmp_path / "job", dataset)
    drill.hold(7)
    drill.submit_by_command(checkout)
    drill.wait_held(7)
    trainer.write_text("raise RuntimeError('an edit')\n")
    (checkout / "pretrain" / "untracked.py").unlink()
    drill.planned_signal()
    drill.wait_queued_again()
    drill.wait_ended()
    drill.check("code edited after submission; planned signal", reference(2), stops=[7])
