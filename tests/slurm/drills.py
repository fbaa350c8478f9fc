"""A run of the real trainer as a job on the test cluster, what may befall it, and the proof that it came back."""

import json
import re
import shlex
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from pretrain.run.journal import read
from tests.runs import ROOT, SMALL, attempts, check_resumed, newest_on_disk
from tests.slurm.cluster import Cluster
from tests.slurm.faulty import PLACE
from tests.slurm.processes import programs, signal_all, wait_until
from tests.warm import command

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
STEPS, INTERVAL = 30, 5
TRAINER = "tests.slurm.faulty"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PYTHON = """#!/bin/bash
# The trainer is started with its faults, which its code need not have; anything else as it is.
[ "$1 $2 $3" != "-P -m pretrain" ] || {{ shift 3; set -- {trainer} "$@"; }}
export PYTHONPATH=${{PYTHONPATH:+$PYTHONPATH:}}{root}
exec {python} "$@"
"""


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    """Of a run of milliseconds a step, fp32, ZeRO 1, noise on."""
    settings = [f"data.path={dataset}", f"run.dir={run_dir}", f"train.steps={STEPS}", f"train.eval_every={STEPS}"]
    settings += [f"train.checkpoint_every={INTERVAL}", "train.keep_checkpoints=1"]
    return [*SMALL, *settings, *more]


class Drill:
    """One job, its run folder, and what was on disk each time it was queued again."""

    def __init__(
        self, cluster: Cluster, folder: Path, dataset: Path, *more: str, run_dir: Path | None = None, warm: bool = False
    ) -> None:
        """`more` are settings of the run; its folder is `folder`/run unless given. Submits nothing yet.

        `warm`: the ranks are forks, of which a SIGSTOP reaches none.
        """
        folder.mkdir(exist_ok=True)
        self.cluster = cluster
        self.folder = folder
        self._trainer = command(TRAINER)[1:] if warm else ["-P", "-m", TRAINER]
        self.run_dir = run_dir or folder / "run"
        self.journal = self.run_dir / "metrics.jsonl"
        self.log = folder / "log"
        self.job = ""
        self.on_disk: list[int | None] = []
        self._faults: list[dict[str, Any]] = []
        self._report = -1.0
        self._script = SCRIPT
        self.arguments = arguments(dataset, self.run_dir, *more)

    def hold(self, step: int, rank: int = 0, restart: int = 0) -> None:
        """Have a rank wait in the middle of a step, in one start of the job, until it gets a signal or `go`."""
        self._faults.append({"restart": restart, "rank": rank, "step": step, "folder": str(self.folder)})

    def fail(self, step: int, rank: int, restart: int, **fault: str) -> None:
        """Have a rank fail: error="…" in the middle of a step, phase="…" is its death when it saves the step."""
        self._faults.append({"restart": restart, "rank": rank, "step": step, "folder": str(self.folder), **fault})

    def report_slowly(self, seconds: float, patience: int = 60) -> None:
        """The real report, after so long; srun waits for a rank, once another one has ended, for its `patience`."""
        self._report = seconds
        self._script = self.folder / "pretrain.sbatch"
        text = SCRIPT.read_text()
        assert "--wait=60" in text
        self._script.write_text(text.replace("--wait=60", f"--wait={patience}"))

    def submit(self, nodes: int = 2, *options: str) -> str:
        """A new job on the run's folder, with the faults that were asked for since the last one; its number."""
        size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        words = ["sbatch", "--parsable", *size, f"--output={self.log}", *options, str(self._script), *self.arguments]
        site = {"DUET_CODE": str(ROOT), "DUET_PYTHON": self.python(), "DUET_PREFLIGHT": "0"}
        return self.begin(self.cluster.run(*words, environment=site | self.environment()).split(";")[0].strip())

    def submit_by_command(self, checkout: Path) -> str:
        """The same by `duet submit`, from a checkout."""
        site = {"gpus_per_node": 0, "python": self.python(), "environment": self.environment(), "time": "0:30:00"}
        file = self.folder / "site.yaml"
        file.write_text(yaml.safe_dump(site))
        words = ["-P", "-m", "launch.cli", "submit", *self.arguments, "--cluster", str(file), "--nodes", "2"]
        said = self.cluster.run(sys.executable, *words, environment={"PYTHONPATH": str(checkout)})
        job = said.split()[1].removesuffix(":")
        self.log = self.run_dir / "logs" / f"slurm-{job}.out"
        return self.begin(job)

    def python(self) -> str:
        """A program that is Python, but for the trainer."""
        file = self.folder / "python"
        file.write_text(PYTHON.format(trainer=shlex.join(self._trainer), root=ROOT, python=shlex.quote(sys.executable)))
        file.chmod(0o755)
        return str(file)

    def environment(self) -> dict[str, str]:
        """Of the job."""
        faults = {"DRILL_FAULTS": json.dumps(self._faults), "DRILL_REPORT": str(self._report)}
        return faults | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

    def begin(self, job: str) -> str:
        """The run is now this job's."""
        if self.job:
            self.on_disk.append(newest_on_disk(self.run_dir))
        self.job, self._faults = job, []
        return job

    def wait_held(self, step: int, rank: int = 0, restart: int = 0) -> None:
        """Until the rank stands in the step."""
        held = self.folder / f"held-{PLACE.format(restart=restart, rank=rank, step=step)}"
        wait_until(lambda: held.exists() or self._state() in ENDED, 180, f"rank {rank} in step {step}")
        assert held.exists(), self.said()

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

    def wait_queued_again(self, restarts: int = 1, start: bool = True) -> None:
        """Until Slurm has queued the job again so many times; ends its wait there if it is to `start`."""

        def queued() -> bool:
            job = self.cluster.job(self.job)
            # When a node is lost, the wait can be over before the job has ended there.
            return job["JobState"] in ("PENDING", "RUNNING") and job["Restarts"] == str(restarts)

        # On its way there the job is CANCELLED for a moment.
        try:
            wait_until(queued, 120, f"job {self.job} queued again")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error
        self.on_disk.append(newest_on_disk(self.run_dir))
        if start:
            self.cluster.start_now(self.job)

    def wait_ended(self, state: str = "COMPLETED") -> None:
        """Until the job is over, and nothing of it is alive."""
        wait_until(lambda: self._state() in ENDED, 300, f"the end of job {self.job}")
        assert self._state() == state, self.said()
        wait_until(lambda: not programs(self.cluster.name, TRAINER, SLURM_JOB_ID=self.job), 30, "the end of its ranks")

    def said(self) -> str:
        """The job's log."""
        return self.log.read_text() if self.log.exists() else "no log"

    def nodes(self, restart: int) -> list[str]:
        """Where a start of the job trained, as its log tells."""
        [names] = re.findall(rf"restart {restart}: start on ([^,]+),", self.said())
        return names.split()

    def check(self, name: str, reference: Path, stops: Collection[int] = ()) -> None:
        """The journal proves that every start went on from the newest checkpoint, bit for bit.

        Prints a line for each time the run came back: what docs/fault-tolerance.md shows.

        Args:
            reference: journal of a run on as many nodes that was never interrupted.
            stops: steps at which a signal had the run save.
        """
        assert check_resumed(self.journal, reference, INTERVAL, self.on_disk, stops) == len(self.on_disk) + 1
        for lost in losses_of_time(self.journal):
            print(
                f"drill: {name}: {lost['again']} steps computed again, {lost['seconds']:.1f} s lost, "
                f"{lost['start']:.1f} s of them from the start of the program on"
            )

    def _state(self) -> str:
        return self.cluster.job(self.job)["JobState"]


def losses_of_time(journal: Path) -> list[dict[str, Any]]:
    """Of a finished run, what each return cost.

    `again`: steps computed again. `seconds`: from the last step before to the first new one; `start`: of these, from
    the start of rank 0's program on. The rest is the end of the old start, and Slurm's.
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
