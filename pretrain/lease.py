"""Who owns a run folder: one attempt at a time.

Each attempt is a file `attempts/000001.json`, created exclusively; the highest number owns the run. It needs no
lock, so it holds on NFS, and what is left behind is the record of all attempts.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.atomic import write_json
from data_pipeline.errors import RunError
from pretrain.job import this_job

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.2


class LeaseLost(RunError):
    """Another start owns the run folder now; this one must not write to it any more."""


class Lease:
    """Ownership of a run folder from `acquire` to `release`, kept alive by a heartbeat thread."""

    def __init__(self, run_dir: Path, attempt: int, record: dict[str, Any]) -> None:
        folder = run_dir / "attempts"
        self.attempt = attempt
        self.lost = False
        """Another attempt took over (this one was frozen for longer than STALE_SECONDS), or the folder is gone."""
        self._run_dir = run_dir
        self._path = attempt_path(folder, attempt)
        self._next = attempt_path(folder, attempt + 1)
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_dir: Path) -> "Lease":
        """Own a run folder, or take over from an owner that is gone.

        In a job, one on another machine is waited for until its heart beats, or has not for STALE_SECONDS: it may just
        have been killed, such as the link of a chain before this one, and nobody is there to try again.

        Raises:
            RunError: another attempt owns it; names job, host and process.
        """
        folder = run_dir / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        beat = None
        while True:
            attempt = latest_attempt(run_dir)
            try:
                check_unowned(run_dir)
                break
            except RunError:
                before, beat = beat, _last_beat_elsewhere(attempt_path(folder, attempt))
                if beat is None or before not in (None, beat):
                    raise
            time.sleep(POLL_SECONDS)
        record = _identity() | {"attempt": attempt + 1, "started": time.time(), "nonce": uuid.uuid4().hex}
        path = attempt_path(folder, attempt + 1)
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        write_json(temporary, record)
        try:
            os.link(temporary, path)  # atomic with its content, and fails when the name is taken: on NFS, too
        except FileExistsError:
            raise RunError(_refusal(run_dir, json.loads(path.read_text()))) from None
        finally:
            temporary.unlink()
        return cls(run_dir, attempt + 1, record)

    def check(self) -> None:
        """Look at the folder itself, not at the last heartbeat.

        Raises:
            LeaseLost: it is no longer ours.
        """
        self.lost = self.lost or not self._is_ours()
        if self.lost:
            raise LeaseLost(f"{self._run_dir}: taken over by another start, or removed; this one writes nothing more")

    def release(self, reason: str) -> None:
        """Let the next attempt begin at once; `reason` says how this one ended."""
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            write_json(self._path, self._record | {"ended": time.time(), "reason": reason})

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release("done" if kind is None else f"{kind.__name__}: {error}")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_ours():
                    self.lost = True
                    return
                os.utime(self._path)
            except OSError:  # a file server that stumbles; the next beat will tell
                continue

    def _is_ours(self) -> bool:
        """Our file is still the one that was made, and the newest."""
        try:
            return self._record["nonce"] in self._path.read_text() and not self._next.exists()
        except FileNotFoundError:
            return False


def latest_attempt(run_dir: Path) -> int:
    """Number of the newest attempt on a run folder; 0 when there was none."""
    folder = run_dir / "attempts"
    if not folder.is_dir():
        return 0
    return max((int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit()), default=0)


def check_unowned(run_dir: Path, clock: float | None = None) -> None:
    """Raises RunError while an attempt owns the run folder; names job, host and process. `clock` as for `alive`."""
    if attempt := latest_attempt(run_dir):
        path = attempt_path(run_dir / "attempts", attempt)
        owner = json.loads(path.read_text())
        if alive(owner, path, clock):
            raise RunError(_refusal(run_dir, owner))


def attempt_path(folder: Path, attempt: int) -> Path:
    """The file of an attempt in a run's folder `attempts`."""
    return folder / f"{attempt:06d}.json"


def _identity() -> dict[str, Any]:
    job, restart = this_job()
    return {
        "format": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": _process_start(os.getpid()),
        "pid_space": _pid_space(),
        "job": job,
        "restart": restart,
    }


def alive(owner: dict[str, Any], path: Path, clock: float | None = None) -> bool:
    """Whether the owner that an attempt's file tells of still has the run folder.

    An earlier start of this process's own job has not: Slurm ends it before the next, or has lost its node. On another
    machine the heartbeat decides: against `clock` (seconds since the epoch), or else against a file that is touched
    beside it, so that only the file system's own clock counts.
    """
    job, restart = this_job()
    if "ended" in owner or (job and owner.get("job") == job and owner.get("restart", 0) < restart):
        return False
    if owner["pid_space"] == _pid_space():
        return bool(owner["pid_started"] == _process_start(owner["pid"]))
    if clock is None:
        probe = path.with_name(f".{uuid.uuid4().hex}.probe")
        probe.touch()
        clock = probe.stat().st_mtime
        probe.unlink()
    return clock - path.stat().st_mtime < STALE_SECONDS


def _last_beat_elsewhere(path: Path) -> float | None:
    """Of an owner on another machine, as a job sees it."""
    if this_job()[0] is None or json.loads(path.read_text())["pid_space"] == _pid_space():
        return None
    return path.stat().st_mtime


def _pid_space() -> str:
    """Where a process number has a meaning: this boot of this machine, in this container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot: tells a process from a later one of the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _refusal(run_dir: Path, owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return (
        f"{run_dir}: another start owns this run folder (attempt {owner['attempt']}: {job}"
        f"process {owner['pid']} on {owner['host']}); wait for it or end it, or choose another run.name"
    )
