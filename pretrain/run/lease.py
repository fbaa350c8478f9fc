"""Who owns a run folder: one attempt at a time.

Each attempt is a file `attempts/000001.json`, created exclusively; the highest number owns the run. It needs no
lock, so it holds on NFS, and what is left behind is the record of all attempts.

Whether an owner on another machine is alive is seen from its heartbeat: the file changes while one watches it. No clock
is compared with another one, for they differ. Time in which the file system did not answer is no time watched: it kept
the owner from beating, too.
"""

import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.files.sealed import unseal, write_sealed
from pretrain.run.job_records import this_job

HEARTBEAT_SECONDS = 5.0
GONE_SECONDS = 30.0
"""Six heartbeats: for so long an owner is watched that does not beat."""
STALE_SECONDS = 60.0
"""The same for who only looks once, and so compares clocks."""
POLL_SECONDS = 0.2
FORMAT = 2
"""Records of format 1 have no hash."""
LOST_FOLDER = (
    "this run folder was renamed or removed, or taken over by another start; this one ends and writes nothing more. A "
    "run whose folder was renamed goes on there: duet train FOLDER/config.yaml"
)


class LeaseLost(RunError):
    """Another start owns the run folder now; this one must not write to it any more."""


class Lease:
    """Ownership of a run folder from `acquire` to `release`, kept alive by a heartbeat thread."""

    def __init__(self, run_dir: Path, attempt: int, record: dict[str, Any]) -> None:
        folder = run_dir / "attempts"
        self.attempt = attempt
        self.lost = False
        """Another attempt took over (this one was frozen for longer than GONE_SECONDS), or the folder is gone."""
        self._run_dir = run_dir
        self._path = attempt_path(folder, attempt)
        self._next = attempt_path(folder, attempt + 1)
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_dir: Path, tell: Callable[[str], None] | None = None) -> "Lease":
        """Own a run folder, or take over from an owner that is gone; as `await_unowned`.

        Raises:
            RunError: another attempt owns it; names job, host and process.
        """
        folder = run_dir / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        attempt = await_unowned(run_dir, tell) + 1  # not the newest now: another start may have made one meanwhile
        record = _identity() | {"attempt": attempt, "started": time.time(), "nonce": uuid.uuid4().hex}
        path = attempt_path(folder, attempt)
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        write_sealed(temporary, record)
        try:
            os.link(temporary, path)  # atomic with its content, and fails when the name is taken: on NFS, too
        except FileExistsError:
            raise RunError(_refusal(run_dir, attempt, read_owner(path))) from None
        finally:
            temporary.unlink()
        return cls(run_dir, attempt, record)

    def check(self) -> None:
        """Look at the folder itself, not at the last heartbeat.

        Raises:
            LeaseLost: it is no longer ours.
        """
        self.lost = self.lost or not self._is_ours()
        if self.lost:
            raise LeaseLost(f"{self._run_dir}: {LOST_FOLDER}")

    def release(self, reason: str) -> None:
        """Let the next attempt begin at once; `reason` says how this one ended."""
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            write_sealed(self._path, self._record | {"ended": time.time(), "reason": reason})

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
            text = self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if self._next.exists():
            return False
        try:
            return bool(unseal(text).get("nonce") == self._record["nonce"])
        except ValueError:  # damaged, and nobody else writes it
            write_sealed(self._path, self._record)
            return True


@contextmanager
def still_there(run_dir: Path) -> Iterator[None]:
    """What cannot be found because the run folder is gone is an error that says so."""
    try:
        yield
    except (FileNotFoundError, CheckpointError) as error:
        if run_dir.is_dir():
            raise
        raise LeaseLost(f"{run_dir}: {LOST_FOLDER}") from error


def latest_attempt(run_dir: Path) -> int:
    """Number of the newest attempt on a run folder; 0 when there was none."""
    folder = run_dir / "attempts"
    if not folder.is_dir():
        return 0
    return max((int(p.stem) for p in folder.glob("*.json") if re.fullmatch(r"[0-9]{6,18}", p.stem)), default=0)


def read_owner(path: Path) -> dict[str, Any] | None:
    """What an attempt's file tells of its owner; None when it is damaged."""
    try:
        owner = unseal(path.read_bytes(), formats=(FORMAT,))
    except (OSError, ValueError):
        return None
    kinds: dict[str, Any] = {"attempt": int, "started": int | float, "job": str | None}
    if "ended" not in owner:
        kinds |= {"pid": int, "pid_space": str, "host": str}
    return owner if all(isinstance(owner.get(name), kind) for name, kind in kinds.items()) else None


def check_unowned(run_dir: Path, clock: float | None = None) -> None:
    """A look that does not wait, as `alive`. Raises RunError while an attempt seems to own the run folder."""
    if attempt := latest_attempt(run_dir):
        path = attempt_path(run_dir / "attempts", attempt)
        owner = read_owner(path)
        if alive(owner, path, clock):
            raise RunError(_refusal(run_dir, attempt, owner))


def await_unowned(run_dir: Path, tell: Callable[[str], None] | None = None) -> int:
    """Returns when no attempt owns the run folder: the number of the one that did last, 0 for none.

    An owner on another machine, or one whose record is damaged, is watched until its heart beats, or has not for
    GONE_SECONDS by this machine's clock; `tell` says so, on the error stream unless given.

    Raises:
        RunError: an attempt owns it; names job, host and process.
    """
    seen: tuple[int, int] | None = None
    since = looked = 0.0
    while attempt := latest_attempt(run_dir):
        path = attempt_path(run_dir / "attempts", attempt)
        owner = read_owner(path)
        known = _known_alive(owner)
        if known is False:
            return attempt
        beat = (attempt, _beat(path))
        if known or seen not in (None, beat):
            raise RunError(_refusal(run_dir, attempt, owner))
        now = time.monotonic()
        if seen is None:
            (tell or _to_stderr)(
                f"{run_dir}: another start may still own this run folder ({_who(attempt, owner)}); its heartbeat is "
                f"watched for {GONE_SECONDS:g} s, then it counts as gone"
            )
        if seen is None or now - looked > HEARTBEAT_SECONDS:  # the file system did not answer meanwhile
            seen, since = beat, now
        elif now - since >= GONE_SECONDS:
            return attempt
        looked = now
        time.sleep(POLL_SECONDS)
    return 0


def attempt_path(folder: Path, attempt: int) -> Path:
    """The file of an attempt in a run's folder `attempts`."""
    return folder / f"{attempt:06d}.json"


def _identity() -> dict[str, Any]:
    job, restart = this_job()
    return {
        "format": FORMAT,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": _process_start(os.getpid()),
        "pid_space": _pid_space(),
        "job": job,
        "restart": restart,
    }


def alive(owner: dict[str, Any] | None, path: Path, clock: float | None = None) -> bool:
    """Whether the owner that an attempt's file tells of seems to have the run folder still; for those who only tell.

    On another machine the age of the heartbeat decides: by `clock` (seconds since the epoch), or else by a file that is
    touched beside it, so that only the file system's own clock counts.
    """
    known = _known_alive(owner)
    if known is not None:
        return known
    if clock is None:
        probe = path.with_name(f".{uuid.uuid4().hex}.probe")
        probe.touch()
        clock = probe.stat().st_mtime
        probe.unlink()
    return abs(clock - _beat(path) / 1e9) < STALE_SECONDS


def _known_alive(owner: dict[str, Any] | None) -> bool | None:
    """None where only the heartbeat tells: on another machine, or when the record is damaged.

    An earlier start of this process's own job is over: Slurm ends it before the next, or has lost its node.
    """
    if owner is None:
        return None
    job, restart = this_job()
    if "ended" in owner or (job and owner.get("job") == job and owner.get("restart", 0) < restart):
        return False
    if owner["pid_space"] == _pid_space():
        return bool(owner.get("pid_started") == _process_start(owner["pid"]))
    return None


def _beat(path: Path) -> int:
    """Of a heart, in the nanoseconds of whoever's clock; 0 when there is no file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


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


def _who(attempt: int, owner: dict[str, Any] | None) -> str:
    if owner is None:
        return f"attempt {attempt}: its record in attempts is damaged"
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"attempt {attempt}: {job}process {owner.get('pid')} on {owner.get('host')}"


def _refusal(run_dir: Path, attempt: int, owner: dict[str, Any] | None) -> str:
    return (
        f"{run_dir}: another start owns this run folder ({_who(attempt, owner)}); wait for it or end it, or choose "
        "another run.name"
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
