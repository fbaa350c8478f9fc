"""Which processes belong to a cluster of tests/slurm/cluster.py, found in /proc: no pid file can be stale.

Daemons carry a mark in their environment. Tasks carry the cluster's name there, which Slurm sets. A slurmstepd writes
its title over its environment and is known by the node's log file, which it holds open.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MARK = "DUET_TEST_CLUSTER"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Raises TimeoutError when the condition does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def signal_all(pids: Iterable[int], number: int) -> None:
    """To those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_and_wait(pids: Iterable[int], seconds: float = 60) -> None:
    """SIGKILL, and wait until they are gone or zombies."""
    pids = list(pids)
    signal_all(pids, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)), seconds, f"death of {pids}")


def alive(pid: int) -> bool:
    """Neither gone nor a zombie, which stays until process 1 reaps it."""
    return _parent(pid) is not None


def daemons(folder: Path) -> list[int]:
    """munged, slurmctld and slurmd's."""
    mark = f"{MARK}={folder}".encode()
    return [pid for pid in _pids() if mark in _environment(pid) and not _is_stepd(pid)]


def stepds(folder: Path) -> list[int]:
    """What manages a job's step on its node, or its batch script."""
    return [pid for pid in _pids() if _is_stepd(pid) and open_logs(pid, folder)]


def tasks(cluster_name: str) -> list[int]:
    """Batch scripts, srun's, ranks."""
    mark = f"SLURM_CLUSTER_NAME={cluster_name}".encode()
    return [pid for pid in _pids() if mark in _environment(pid)]


def programs(cluster_name: str, module: str, **variables: object) -> list[int]:
    """Those of the tasks that are `python -m module` and have these in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = [pid for pid in tasks(cluster_name) if wanted <= set(_environment(pid))]
    commands = {pid: _read(pid, "cmdline") for pid in found}
    return [pid for pid in found if module.encode() in commands[pid] and b"srun" not in commands[pid][0]]


def open_logs(pid: int, folder: Path) -> set[str]:
    """Names of the cluster's log files that a process holds open."""
    try:
        links = [file.readlink() for file in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {link.name for link in links if link.parent == folder / "log"}


def descendants(pids: Iterable[int]) -> set[int]:
    """Children, and theirs."""
    parents = {pid: _parent(pid) for pid in _pids()}
    first = set(pids)
    found = set(first)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - first


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(int(name)) is not None]


def _parent(pid: int) -> int | None:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def _environment(pid: int) -> list[bytes]:
    return _read(pid, "environ")


def _read(pid: int, file: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def _is_stepd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("slurmstepd")
    except OSError:
        return False
