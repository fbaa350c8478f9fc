"""A run of the real trainer as a job on the test cluster, what may befall it, and the proof that it came back."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.journal import read
from tests.runs import ROOT, SMALL, attempts, check_resumed, newest_on_disk
from tests.slurm.cluster import Cluster
from tests.slurm.faulty import PLACE
from tests.slurm.processes import programs, signal_all, wait_until

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
STEPS, INTERVAL = 30, 5
TRAINER = "tests.slurm.faulty"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PYTHON = """#!/bin/bash
# The trainer is started with its faults, anything else as it is.
[ "$1 $2 $3" != "-P -m pretrain" ] || {{ shift 3; set -- -P -m {trainer} "$@"; }}
exec {python} "$@"
"""


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    """Of a run of milliseconds a step, fp32, ZeRO 1, noise on."""
    settings = [f"data.path={dataset}", f"run.dir={run_dir}", f"train.steps={STEPS}", f"train.eval_every={STEPS}"]
    settings += [f"train.checkpoint_every={INTERVAL}", "train.keep_checkpoints=1"]
    return [*SMALL, *settings, *more]


class Drill:
    """One job, its run folder, and what was on disk each time it was queued again."""

    def __init__(self, cluster: Cluster, folder: Path, dataset: Path, *more: str) -> None:
        """`more` are settings of the run. Submits nothing yet."""
        self.cluster = cluster
        self.folder = folder
        self.run_dir = folder / "run"
        self.journal = self.run_dir / "metrics.jsonl"
        self.log = folder / "log"
        self.job = ""
        self.on_disk: list[int | None] = []
        self._faults: list[dict[str, Any]] = []
        self._arguments = arguments(dataset, self.run_dir, *more)

    def hold(self, step: int, rank: int = 0, restart: int = 0) -> None:
        """Have a rank wait in the middle of a step, in one start of the job, until it gets a signal or `go`."""
        self._faults.append({"restart": restart, "rank": rank, "step": step, "folder": str(self.folder)})

    def die(self, step: int, phase: str, rank: int) -> None:
        """Have a rank killed when it enters a phase of saving a step, in the first start of the job."""
        self._faults.append({"restart": 0, "rank": rank, "step": step, "phase": phase})

    def submit(self, nodes: int = 2, *options: str, **environment: str) -> str:
        """The job's number; its folder is new, or holds a run that goes on."""
        python = self.folder / "python"
        python.write_text(PYTHON.format(trainer=TRAINER, python=shlex.quote(sys.executable)))
        python.chmod(0o755)
        site = {
            "RUN_DIR": str(self.run_dir),
            "DUET_PYTHON": str(python),
            "DUET_CODE": str(ROOT),
            "DUET_PREFLIGHT": "0",
            "DRILL_FAULTS": json.dumps(self._faults),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        command = ["sbatch", "--parsable", *size, f"--output={self.log}", *options, str(SCRIPT), *self._arguments]
        self.job = self.cluster.run(*command, environment=site | environment).split(";")[0].strip()
        return self.job

    def wait_held(self, step: int, rank: int = 0, restart: int = 0) -> None:
        """Until the rank stands in the step."""
        held = self.folder / f"held-{PLACE.format(restart=restart, rank=rank, step=step)}"
        wait_until(lambda: held.exists() or self._ended(), 180, f"rank {rank} in step {step}")
        assert held.exists(), self.log.read_text()

    def go(self, step: int, rank: int = 0, restart: int = 0) -> None:
        """Let the rank go on."""
        (self.folder / f"go-{PLACE.format(restart=restart, rank=rank, step=step)}").touch()

    def ranks(self, rank: int) -> list[int]:
        """Processes of the job that are this rank."""
        return programs(self.cluster.name, TRAINER, SLURM_JOB_ID=self.job, SLURM_PROCID=rank)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        pids = self.ranks(rank)
        assert len(pids) == 1, f"rank {rank} is {pids}"
        signal_all(pids, number)

    def planned_signal(self) -> None:
        """What comes before the time limit, now."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)

    def wait_queued_again(self, restarts: int = 1) -> None:
        """Until Slurm has queued the job again so many times; ends its wait there."""

        def queued() -> bool:
            job = self.cluster.job(self.job)
            return job["JobState"] == "PENDING" and job["Restarts"] == str(restarts)

        # On its way there the job is CANCELLED for a moment.
        try:
            wait_until(queued, 120, f"job {self.job} queued again")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from error
        self.on_disk.append(newest_on_disk(self.run_dir))
        self.cluster.start_now(self.job)

    def wait_ended(self, state: str = "COMPLETED") -> None:
        """Until the job is over."""
        found = self.cluster.wait_for_job(self.job, *ENDED, seconds=300)
        assert found["JobState"] == state, f"{found}\n{self.log.read_text()}"

    def check(self, name: str, reference: Path, again_at_most: int = 2 * INTERVAL) -> None:
        """The journal proves that every start went on from the newest checkpoint, bit for bit; prints the loss of time.

        Args:
            reference: journal of a run on as many nodes that was never interrupted.
            again_at_most: steps that were computed again.
        """
        interval = INTERVAL if again_at_most else 1  # the planned stop saves at any step
        assert check_resumed(self.journal, reference, interval, self.on_disk) == len(self.on_disk) + 1
        for number, lost in enumerate(losses_of_time(self.journal), start=1):
            assert lost["again"] <= again_at_most
            print(
                f"drill: {name}: return {number}: {lost['again']} steps computed again, {lost['seconds']:.1f} s lost, "
                f"{lost['start']:.1f} s of them from the start of the program"
            )

    def _ended(self) -> bool:
        return self.cluster.job(self.job)["JobState"] in ENDED


def losses_of_time(journal: Path) -> list[dict[str, Any]]:
    """What each return cost: steps computed `again`; `seconds` from the last step before to the first new one.

    `start`: of these, from the start of rank 0's program on; the rest is the end of the old start, and Slurm's.
    """
    found: list[dict[str, Any]] = []
    newest, newest_time = 0, 0
    lost: dict[str, Any] | None = None
    for record in read(journal):
        if record.kind == "start" and newest:
            lost = {"again": 0, "program": record.fields["started"], "before": newest_time / 1e3}
            found.append(lost)
        elif record.kind == "metrics" and "loss/train" in record.metrics:
            assert record.step is not None
            if lost and record.step <= newest:
                lost["again"] += 1
            elif lost:
                lost["seconds"] = record.time / 1e3 - lost["before"]
                lost["start"] = record.time / 1e3 - lost["program"]
                lost = None
            if record.step > newest:
                newest, newest_time = record.step, record.time
    return found


def check_close(journal: Path, reference: Path, tolerance: float, steps: int = 20) -> float:
    """The last start resumed, and its first `steps` losses are near those of the uninterrupted run; how near."""
    *_, (resumed_from, found) = attempts(journal)
    [(_, expected)] = attempts(reference)
    assert resumed_from is not None
    assert resumed_from == min(found) - 1
    assert len(found) >= steps
    compared = sorted(found)[:steps]
    worst = max(abs(found[step]["loss/total"] - expected[step]["loss/total"]) for step in compared)
    assert worst <= tolerance
    return worst
