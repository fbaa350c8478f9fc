"""What a run folder knows of its Slurm jobs, and the heartbeat: the tie between ranks, batch script and command line.

slurm/job.sbatch  slurm/config.yaml  slurm/jobs.jsonl  slurm/wants-requeue  slurm/stop  slurm/exclude.jsonl
slurm/failures.jsonl  slurm/failures/JOB-RESTART-rank-R.json  slurm/decisions.jsonl  heartbeat

Free of torch. Each record carries its own hash. Readers leave out what is missing, torn or altered: another node may be
in the middle of writing a record. One without a hash, as you may have written it by hand, counts.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import UserError
from data_pipeline.files.atomic import named
from data_pipeline.files.sealed import seal, unseal, write_sealed
from data_pipeline.secret import redact

R = TypeVar("R", "RankFailure", "Failure", "Heartbeat", "Wish")
HEARTBEAT_SHARE = 0.01
"""Of the time that writing heartbeats may take; a slow file system gets fewer of them."""


def this_job() -> tuple[str | None, int]:
    """Slurm's number of the job this process belongs to (None outside of Slurm), and how often it was requeued."""
    # Slurm leaves the count out in the first run.
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


@dataclass(frozen=True)
class RankFailure:
    """Why one rank ended."""

    job: str
    restart: int
    rank: int
    host: str
    what: str
    """The error, without its traceback."""
    mistake: bool = False
    """The user can mend it, and another try cannot."""
    step: int | None = None
    """The one that was being taken; None before the first."""
    samples: list[int] = field(default_factory=list)
    """The first and the last of the batch, over all ranks: positions in the data order."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Failure:
    """Why one start of a job ended, as far as its ranks could tell; None is what is not known."""

    job: str
    restart: int
    rc: int
    """What srun returned."""
    what: str
    mistake: bool = False
    step: int | None = None
    rank: int | None = None
    host: str | None = None
    samples: list[int] = field(default_factory=list)
    checkpoint: int | None = None
    """Step of the newest one when the job step ended."""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Heartbeat:
    """How far a run is, from its rank 0. `step` is finished; `time` in seconds since the epoch."""

    step: int
    attempt: int
    loss: float | None = None
    """Of the last step that was logged, as are the tokens per second."""
    tokens_per_second: float | None = None
    checkpoint: int | None = None
    """Step of the last one that this attempt wrote or began from."""
    validating: float | None = None
    """When a validation that is under way has last done a batch."""
    validated: float | None = None
    """The share of it that is done."""
    job: str | None = field(default_factory=lambda: this_job()[0])
    restart: int = field(default_factory=lambda: this_job()[1])
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Wish:
    """Rank 0 asks for a requeue."""

    step: int
    """Where the run stands, and is saved."""
    trained: int
    """Steps that this start has taken: without any, there is no progress to go on with."""
    job: str | None
    restart: int
    """Of the start that asks; to the next ones, and to other jobs, it means nothing."""
    time: float = field(default_factory=time.time)


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


class JobFolder:
    """Paths and records of a run folder's Slurm part."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "slurm"
        self.script = self.path / "job.sbatch"
        self.config = self.path / "config.yaml"
        self.heartbeat = run_dir / "heartbeat"
        self.kill_switch = self.path / "stop"
        """When it exists, the run saves at the end of the step and is not requeued."""
        self._jobs = self.path / "jobs.jsonl"
        self._wants_requeue = self.path / "wants-requeue"
        self._excluded = self.path / "exclude.jsonl"
        self._failures = self.path / "failures.jsonl"
        self._decisions = self.path / "decisions.jsonl"
        self._of_ranks = self.path / "failures"

    def request_requeue(self, step: int, trained: int) -> None:
        """The run stands at `step`, saved because of the planned signal, after `trained` steps of this start."""
        self.path.mkdir(exist_ok=True)
        write_sealed(self._wants_requeue, asdict(Wish(step, trained, *this_job())))

    def requeue_wish(self) -> "Wish | None":
        """The last one, of whatever start; None when nobody ever asked to be requeued."""
        return next(iter(_records(Wish, [_json(self._wants_requeue)])), None)

    def submitted(self, job: str, cluster: str, nodes: str, command: list[str], array: str | None = None) -> None:
        """Record a submission; `nodes` as Slurm was asked for them."""
        record = {"job": job, "submitted": time.time(), "cluster": cluster, "nodes": nodes, "command": command}
        self._append(self._jobs, record | ({"array": array} if array else {}))

    def submissions(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        return _lines(self._jobs)

    def exclude(self, node: str, reason: str) -> None:
        """Have the next starts avoid a node; `launch.slurm.exclude` knows whether that may be."""
        job, restart = this_job()
        record = {"node": node, "time": time.time(), "job": job, "restart": restart, "reason": reason}
        self._append(self._excluded, record)

    def excluded(self) -> list[dict[str, Any]]:
        """Nodes to avoid, each once, with the last reason; in the order they were first named."""
        return list({line["node"]: line for line in self._exclusions()}.values())

    def excluded_by(self, job: str | None, restart: int) -> list[str]:
        """Nodes that one start of a job has excluded."""
        ours = [line for line in self._exclusions() if (line.get("job"), line.get("restart")) == (job, restart)]
        return list(dict.fromkeys(line["node"] for line in ours))

    def _exclusions(self) -> list[dict[str, Any]]:
        lines = _lines(self._excluded)
        return [x for x in lines if isinstance(x.get("node"), str) and isinstance(x.get("time", 0.0), int | float)]

    def failed(self, failure: Failure) -> None:
        """Record why a start of a job ended."""
        self._append(self._failures, asdict(failure))

    def failures(self) -> list[Failure]:
        """Of all starts of all jobs, in order."""
        return _records(Failure, _lines(self._failures))

    def decided(self, action: str, reason: str, rc: int, signal: str) -> None:
        """Record what was decided after a start of this job: an action of `launch.slurm.policy`, and why."""
        job, restart = this_job()
        record = {"job": job, "restart": restart, "time": time.time(), "action": action, "reason": reason}
        self._append(self._decisions, record | {"rc": rc, "signal": signal})

    def decisions(self) -> list[dict[str, Any]]:
        """Of all starts of all jobs, in order."""
        return [line for line in _lines(self._decisions) if isinstance(line.get("time"), int | float)]

    def rank_failed(self, failure: RankFailure) -> None:
        """Record why a rank ended."""
        self._of_ranks.mkdir(parents=True, exist_ok=True)
        name = f"{failure.job}-{failure.restart}-rank-{failure.rank}.json"
        write_sealed(self._of_ranks / name, asdict(failure))

    def rank_failures(self, job: str, restart: int) -> list[RankFailure]:
        """Of one start of a job, the earliest first: what comes later is most likely its consequence."""
        found = [_json(file) for file in self._of_ranks.glob(f"{job}-{restart}-rank-*.json")]
        return sorted(_records(RankFailure, found), key=lambda failure: failure.time)

    def last_heartbeat(self) -> Heartbeat | None:
        """None when there is none."""
        return next(iter(_records(Heartbeat, [_json(self.heartbeat)])), None)

    def _append(self, file: Path, record: dict[str, Any]) -> None:
        """One write, on disk when this returns; what a crash tore off before becomes a line of its own."""
        self.path.mkdir(parents=True, exist_ok=True)
        with named(file), open(file, "a+b", buffering=0) as out:
            size = out.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(out.fileno(), 1, size - 1) != b"\n"
            line = b"\n" * torn + seal(json.dumps(record)).encode() + b"\n"
            if out.write(line) < len(line):  # a full disk takes a part, and says so to the next one only
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(out.fileno())


class Pulse:
    """Writes the heartbeat of a run, into its folder wherever that is moved."""

    def __init__(self, folder: JobFolder) -> None:
        self._run_dir = folder.path.parent
        self._next = 0.0
        self._descriptor = os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY)  # for the life of the process

    @property
    def in_place(self) -> bool:
        """Whether the folder still is where it was."""
        try:
            return os.path.samestat(self._run_dir.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def rested(self) -> None:
        """The next beat is written however short ago the last one was."""
        self._next = 0.0

    def beat(self, heartbeat: Heartbeat) -> None:
        """Replace the file, without waiting for the disk: 65 µs measured on ext4, 15 µs in memory.

        Raises:
            FileNotFoundError: the folder was removed.
        """
        since = time.perf_counter()
        if since < self._next:
            return
        where, name = self._descriptor, ".heartbeat.tmp"
        temporary = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=where)
        try:
            os.write(temporary, seal(json.dumps(vars(heartbeat))).encode())
        finally:
            os.close(temporary)
        os.replace(name, "heartbeat", src_dir_fd=where, dst_dir_fd=where)
        now = time.perf_counter()
        self._next = now + (now - since) / HEARTBEAT_SHARE


class FailureFile:
    """Use as a context: an error that leaves it is written down for the policy, in a Slurm job. May be entered twice.

    The batch script names the run folder in RUN_DIR.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._step: int | None = None
        self._samples: list[int] = []
        self._written: bool | None = None
        """Whether what was written down is a mistake."""

    def at(self, step: int, first_sample: int, num_samples: int) -> None:
        """This step is being taken."""
        self._step, self._samples = step, [first_sample, first_sample + num_samples - 1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (job, restart), run_dir = this_job(), os.environ.get("RUN_DIR")
        mistake = isinstance(error, UserError)
        # Further out an error may be known for a mistake, such as a disk that is full.
        known = self._written is not None and (self._written or not mistake)
        if self._step is not None and run_dir and not Path(run_dir).is_dir():
            return  # the run folder was renamed or removed: it is not made anew
        if not isinstance(error, Exception) or known or not job or not run_dir:
            return
        self._written = mistake
        what = str(error) if mistake else redact(f"{type(error).__name__}: {error}")
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        failure = RankFailure(job, restart, self._rank, host, what, mistake, self._step, self._samples)
        try:
            JobFolder(Path(run_dir)).rank_failed(failure)
        except OSError as refused:  # the error itself matters more
            print(f"the failure of rank {self._rank} could not be written down: {refused}", file=sys.stderr)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [record for line in _bytes(file).split(b"\n") if (record := _parsed(line))]


def _json(file: Path) -> dict[str, Any]:
    return _parsed(_bytes(file))


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        return unseal(text, formats=())
    except ValueError:
        return {}


def _records(kind: type[R], found: Iterable[dict[str, Any]]) -> list[R]:
    """Leaves out records without what every one has, or of wrong types, and what a newer version may have added."""
    made: list[R] = []
    for record in filter(None, found):
        with contextlib.suppress(ValidationError):
            if kind not in _ADAPTERS:  # built when a record is there: that takes longer than all else here
                _ADAPTERS[kind] = TypeAdapter(kind)
            made.append(_ADAPTERS[kind].validate_python(record))
    return made
