"""The batch script and the policy on a real Slurm; the trainer is a stand-in of a few lines (standin.py)."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.job_records import JobFolder
from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PYTHON = """#!/bin/bash
[ "$3" != launch.commands.preflight ] || [ -z "$PREFLIGHT" ] || exec {python} -c "$PREFLIGHT" "$4"
[ "$3" != launch.slurm.exclude ] || [ -z "$CANCEL" ] || scancel "$SLURM_JOB_ID"
[ "$3" != launch.slurm.exclude ] || until [ -z "$CANCEL" ] || [ -e "$CANCEL" ]; do sleep 0.05; done
[ "$3" != pretrain ] || exec {python} -m tests.slurm.standin
exec {python} "$@"
"""
RESTARTED = """
scontrol() {
    if [ "$1" = requeue ] && [ ! -e "$RUN_DIR/once" ]; then
        touch "$RUN_DIR/once"
        echo "Unable to contact slurm controller" >&2
        return 1
    fi
    command scontrol "$@"
}
sleep() { command sleep 0.05; }
"""
"""The controller does not answer to the first requeue; nothing takes long."""
PREFLIGHT = """
import os, sys
from pathlib import Path
from pretrain.run.job_records import JobFolder
if os.environ["SLURMD_NODENAME"] == "n1":
    JobFolder(Path(sys.argv[1])).exclude("n1", "no memory")
    sys.exit(11)
"""


class Job:
    """A submission of slurm/pretrain.sbatch in a folder of its own."""

    def __init__(
        self, cluster: Cluster, folder: Path, orders: dict[str, Any], nodes: int = 2, *options: str, **site: Any
    ) -> None:
        self.cluster, self.run_dir, self.log = cluster, folder / "run", folder / "log"
        self.run_dir.mkdir()
        (self.run_dir / "orders").write_text(json.dumps(orders))
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        self.folder = JobFolder(self.run_dir)
        settings = {"DUET_PYTHON": python, "DUET_CODE": ROOT, "DUET_CACHE": folder / "cache", **site}
        command = [
            "sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=30",
            f"--output={self.log}", *options, str(ROOT / "slurm" / "pretrain.sbatch"),
            "model.context=16", "batch.tokens=64", f"run.dir={self.run_dir}", f"data.path={folder / 'data'}",
        ]  # fmt: skip
        environment = cluster.environment | {name: str(value) for name, value in settings.items()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def order(self, **orders: Any) -> None:
        (self.run_dir / "orders").write_text(json.dumps(orders))

    def wait_for_step(self, step: int, restart: int = 0) -> None:
        def there() -> bool:
            assert self.cluster.job(self.id)["JobState"] not in ENDED, self.said()
            beat = self.folder.last_heartbeat()
            return beat is not None and beat.restart == restart and beat.step >= step

        wait_until(there, 60, f"step {step} of restart {restart}")

    def planned_signal(self) -> None:
        """As `--signal=B:USR1@N` sends it."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def wait_requeued(self, number: int) -> None:
        """Wait until it is requeued for the so many'th time, and out of its nodes."""

        def requeued() -> bool:
            job = self.cluster.job(self.id)
            assert job["JobState"] not in ENDED, self.said()
            return job["Restarts"] == str(number) and job["JobState"] != "COMPLETING"

        wait_until(requeued, 60, f"requeue {number}")

    def restarts(self, number: int) -> None:
        """The same, and end the wait that Slurm then imposes."""
        self.wait_requeued(number)
        self.cluster.start_now(self.id)

    def ends(self) -> dict[str, str]:
        return self.cluster.wait_for_job(self.id, *ENDED, seconds=60)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "nothing"


def test_the_planned_signal_saves_requeues_and_goes_on_in_one_log(cluster: Cluster, tmp_path: Path) -> None:
    # What the shell of another job leaves: its size, its third restart, its binding, its working directory.
    other = {"SLURM_MEM_PER_CPU": 100, "SLURM_MEM_PER_NODE": 9, "SLURM_RESTART_COUNT": 3, "SLURM_WORKING_DIR": "/none"}
    other |= {"SLURM_CPU_BIND": "mask_cpu:0xf00", "SLURM_STDOUTMODE": "/none/log", "SRUN_CPUS_PER_TASK": 64}
    job = Job(cluster, tmp_path, {"saves": True}, nodes=3, DUET_DATA="/elsewhere", RANK="1", **other)
    job.wait_for_step(3)
    job.planned_signal()
    job.wait_requeued(1)
    wish = job.folder.requeue_wish()
    assert wish
    job.order(saves=True, steps=wish.step + 2)
    cluster.start_now(job.id)
    ended = job.ends()
    said = job.said()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert [line.split(";")[0] for line in said.splitlines() if line.startswith("resumed")] == [
        "resumed from 0",
        f"resumed from {wish.step}",
    ]
    assert "rank of the shell that submitted: None; data None" in said
    assert said.count("policy: requeue: saved at the planned signal") == 1
    assert said.count("3 nodes cannot share the batch: idle are n3") == 2
    assert said.count("policy: done: all ranks ended well") == 1
    assert job.folder.requeue_wish() == wish, "the old one is there, and did not count for the next start"


def test_the_last_element_of_an_array_is_requeued_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Its number is that of the whole array."""
    job = Job(cluster, tmp_path, {"saves": True}, 1, "--array=0-1%1")
    array = job.id
    job.id = f"{array}_0"
    job.wait_for_step(2)
    cluster.run("scancel", job.id)
    job.ends()
    [cancelled], job.id = [job.id], f"{array}_1"
    wait_until(lambda: job.said().count("resumed from") == 2, 60, "the last element")
    job.planned_signal()
    job.wait_requeued(1)
    wish = job.folder.requeue_wish()
    assert wish
    assert wish.job == array
    job.order(saves=True, steps=wish.step + 2)
    cluster.start_now(job.id)
    assert job.ends()["JobState"] == "COMPLETED", job.said()
    assert cluster.job(cancelled)["JobState"] == "CANCELLED", "it was revived"


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Also when it is about to be requeued: the planned signal has come, and the ranks are deaf to it."""
    job = Job(cluster, tmp_path, {"saves": True, "deaf": True})
    job.wait_for_step(2)
    job.planned_signal()
    cluster.run("scancel", job.id)
    ended = job.ends()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    wait_until(lambda: "policy: stop: Slurm ended the job" in job.said(), 30, "the policy's word")
    assert job.folder.failures() == []


def test_a_job_that_is_cancelled_between_decision_and_requeue(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "preflight.py").write_text(PREFLIGHT)
    run, go = f"exec(open('{tmp_path}/preflight.py').read())", tmp_path / "go"
    job = Job(cluster, tmp_path, {}, DUET_PREFLIGHT=1, PREFLIGHT=run, CANCEL=go)
    job.ends()
    wait_until(lambda: "CANCELLED AT" in job.said(), 30, "SIGTERM")
    go.touch()
    wait_until(lambda: not cluster.run("squeue", "-h", "-t", "CG", "-j", job.id), 30, "the end of its script")
    ended = job.ends()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.said()
    assert "policy: requeue avoiding: the preflight excluded n1" in job.said()


def test_a_crash_loop_is_bounded(cluster: Cluster, tmp_path: Path) -> None:
    """Each start dies of something else, so that only the count can end it; one with progress does not count."""
    job = Job(cluster, tmp_path, {"bug": {"rank": 1, "step": 3, "what": "bug RESTART"}}, DUET_MAX_CRASHES=1)
    job.restarts(1)
    assert job.ends()["JobState"] == "FAILED"
    assert (
        "policy: stop: 2 failures since the beginning, 1 are allowed; the last one: bug x (rank 1 on n2" in job.said()
    )
    assert [(f.restart, f.step, f.samples) for f in job.folder.failures()] == [(0, 3, [24, 31]), (1, 3, [24, 31])]


def test_the_same_failure_at_the_same_step_stops(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, {"bug": {"rank": 1, "step": 3, "what": "bug"}}, DUET_MAX_CRASHES=9)
    job.restarts(1)
    assert job.ends()["JobState"] == "FAILED"
    assert "policy: stop: the same failure twice at step 3, in restart 0 and now: bug (rank 1 on n2" in job.said()


def test_a_killed_rank_is_named(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, {"die": {"rank": 1, "step": 3}}, DUET_MAX_CRASHES=0)
    ended = job.ends()
    assert ended["JobState"] == "FAILED"
    [failure] = job.folder.failures()
    assert (failure.what, failure.rank, failure.host) == ("Killed", 1, "n2")
    assert "policy: stop: 1 failures since the beginning, 0 are allowed" in job.said()


@pytest.mark.parametrize("orders", [{"mistake": "the disk is full"}, {"kill switch": True}])
def test_what_another_try_cannot_mend_is_not_tried_again(
    cluster: Cluster, tmp_path: Path, orders: dict[str, Any]
) -> None:
    job = Job(cluster, tmp_path, orders)
    if "mistake" in orders:
        assert job.ends()["JobState"] == "FAILED"
        assert "policy: stop: another try cannot mend it: the disk is full" in job.said()
    else:
        job.wait_for_step(2)
        job.folder.kill_switch.touch()
        assert job.ends()["JobState"] == "COMPLETED"
        assert "policy: done: the kill switch slurm/stop is there" in job.said()


def test_a_signal_before_the_ranks_and_a_node_that_fails_its_test(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    setup = tmp_path / "setup"
    setup.write_text(
        f"{RESTARTED}touch {tmp_path}/waiting; until [ -e {tmp_path}/go ]; do sleep 0.05; done; : $NOT_SET\n"
    )
    (tmp_path / "preflight.py").write_text(PREFLIGHT)
    run = f"exec(open('{tmp_path}/preflight.py').read())"
    stage = tmp_path / "local disk"
    job = Job(
        cluster,
        tmp_path,
        {"saves": True, "steps": 3},
        DUET_SETUP=setup,
        DUET_PREFLIGHT=1,
        PREFLIGHT=run,
        DUET_STAGE=stage,
    )
    wait_until((tmp_path / "waiting").exists, 60, "the set-up")
    job.planned_signal()
    (tmp_path / "go").touch()
    job.restarts(1)
    assert "no requeue: Unable to contact slurm controller" in job.said()
    assert "resumed" not in job.said(), "nothing was started"
    job.restarts(2)
    ended = job.ends()
    said = job.said()
    assert ended["JobState"] == "COMPLETED", said
    assert "failure 1 of at most 3 since the beginning: the planned signal came before anything was trained" in said
    assert "policy: requeue avoiding: the preflight excluded n1; failure 2" in said
    assert "restart 2: start on n2 n3" in said
    content = hashlib.sha256(b"{}").hexdigest()[:16]
    assert f"data {stage}/duet-{os.getuid()}/data-{content}\n" in said, (
        "another dataset of this name would have another place"
    )
