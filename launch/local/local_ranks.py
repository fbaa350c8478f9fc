"""Ranks on this machine: started together, ended together."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors
from pretrain import status_line
from pretrain.run.run_listing import End, recorded_end
from pretrain.run.signals import EXIT_CODES

GRACE_SECONDS = 15.0
"""What a rank gets to end by itself after another one failed, or after rank 0."""
LINES_SHOWN = 5
"""Of the log of a rank that failed."""
WHAT_CTRL_C_DOES = (
    "stopping: the run saves at the end of this step (Ctrl-C again: end without saving)",
    "ending at once: what is not saved by now, or not in the report, is left (Ctrl-C again: kill)",
    "killed",
)


def run_ranks(args: list[str], ranks: int, logs: Path, *, verbose: bool = False) -> int:
    """Start `python -P -m pretrain ARGS` on each rank and wait; rank 0 has the terminal, the others write to `logs`.

    With `verbose` the libraries have rank 0's terminal, too. Signals go to every rank once. When this process dies,
    even by SIGKILL, the kernel ends the ranks.

    Returns:
        the exit code: that of the recorded end of the run, else that of the first rank that failed, or 0.
    """
    status_line.end()  # rank 0 has one
    meeting = os.memfd_create("duet-rendezvous")  # no file: nothing is left behind by SIGKILL
    environment = os.environ | {
        "DUET_PARENT": str(os.getpid()),
        "DUET_RENDEZVOUS": f"file:///proc/self/fd/{meeting}",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "DUET_COMMAND": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if verbose:
        environment["DUET_VERBOSE"] = "1"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    processes: list[subprocess.Popen[bytes]] = []

    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        if number == signal.SIGINT:
            interrupts += 1
            print(f"\n{WHAT_CTRL_C_DOES[min(interrupts, 3) - 1]}", file=sys.stderr)
            if interrupts >= 3:
                number = signal.SIGKILL
        elif number == signal.SIGHUP:  # the terminal is gone
            number = signal.SIGTERM
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)  # ranks are born so, and hear what came (StopRequest)
    try:
        for rank in range(ranks):
            processes.append(_start(rank, args, environment, logs, meeting))
        for number in (*EXIT_CODES, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, forward)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _wait(processes, logs)


def _start(
    rank: int, args: list[str], environment: dict[str, str], logs: Path, meeting: int
) -> subprocess.Popen[bytes]:
    # -P: a folder `model` where the user stands must not hide ours. A session of its own: Ctrl-C comes through us.
    command = [sys.executable, "-P", "-m", "pretrain", *args]
    ours = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=ours, start_new_session=True, pass_fds=[meeting])
    with disk_errors(logs, RunError):
        logs.mkdir(parents=True, exist_ok=True)
    with open(_log(logs, rank), "ab") as log:
        return subprocess.Popen(command, env=ours, stdout=log, stderr=log, start_new_session=True, pass_fds=[meeting])


def _wait(processes: list[subprocess.Popen[bytes]], logs: Path) -> int:
    failed: int | None = None
    deadline = math.inf
    while None in (codes := [process.poll() for process in processes]):
        if failed is None:
            failed = _first_failed(codes)
        if deadline == math.inf and (failed is not None or codes[0] is not None):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            if codes[0] is None and _end(processes, logs):  # it writes the report, for a time that it bounds itself
                deadline = time.monotonic() + GRACE_SECONDS
                continue
            for process in processes:
                process.kill()
        time.sleep(0.05)
    if end := _end(processes, logs):
        for rank, code in enumerate(codes):
            if code != end.code:
                print(
                    f"warning: the run is over ({end.reason}) and saved; rank {rank} ended with code {code} in what "
                    f"followed; `duet report {shlex.quote(str(logs.parent))}` makes the report",
                    file=sys.stderr,
                )
        return end.code
    if failed is None:
        failed = _first_failed(codes)
    if failed is None:
        return 0
    code = codes[failed] or 0
    told = code == codes[0] and code in (2, 130, 143)  # rank 0 said the same on the terminal
    if (failed or code < 0) and not told:
        log = _log(logs, failed)
        print(f"error: rank {failed} ended with code {code}; the end of {log}:", file=sys.stderr)
        words = log.read_text(errors="replace") if log.is_file() else "there is no such file: the run folder is gone"
        for line in words.splitlines()[-LINES_SHOWN:]:
            print(f"  {line}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _first_failed(codes: list[int | None]) -> int | None:
    """Of the ranks that have failed since the last look: the one that a signal ended, else one whose words are not on
    the terminal. Rank 0 follows a rank that dies within milliseconds."""
    failed = [rank for rank, code in enumerate(codes) if code]
    return max(failed, key=lambda rank: ((codes[rank] or 0) < 0, rank > 0), default=None)


def _end(processes: list[subprocess.Popen[bytes]], logs: Path) -> End | None:
    """The one that this start has recorded."""
    return recorded_end(logs.parent, pid=processes[0].pid)


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"
