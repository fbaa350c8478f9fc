"""A thread of each rank that notices when nothing moves any more, and writes down where the rank stands."""

import faulthandler
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from data_pipeline.errors import UserError

CHECKS = 10
"""A hang is noticed at most a tenth of its time late."""
JOIN_SECONDS = 5.0
STDERR = 2


class Watchdog:
    """Use as a context. Never ends the run: that is the collectives' time limit (`engine.timeout_minutes`).

    The thread needs Python's lock, which waiting in a collective gives away. In case some library never does, a timer
    of faulthandler's, which needs no lock, is armed as well and writes to the rank's log.
    """

    def __init__(self, logs: Path, rank: int, seconds: float, hangs: Callable[[int, str], None]) -> None:
        """`hangs` is called from the thread, once a hang, with the last finished step and what to say."""
        self._logs = logs
        self._rank = rank
        self._seconds = seconds
        self._hangs = hangs
        self._step = 0
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def beat(self, step: int | None = None) -> None:
        """There is progress; `step` is finished."""
        self._step = self._step if step is None else step
        self._since = time.monotonic()

    def __enter__(self) -> "Watchdog":
        faulthandler.enable(STDERR)  # NCCL's own watchdog aborts the process
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(JOIN_SECONDS)  # a disk that hangs must not hold up the end
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, Exception) and not isinstance(error, UserError):  # a lost peer, a time limit, a bug
            try:
                path = self._write("the run ended with:\n" + "".join(traceback.format_exception(error)))
                print(f"stacks of rank {self._rank}: {path}", file=sys.stderr)
            except OSError as failure:  # the error itself matters more
                print(f"the stacks of rank {self._rank} could not be written: {failure}", file=sys.stderr)

    def _run(self) -> None:
        told = False
        while not self._stop.wait(self._seconds / CHECKS):
            idle = time.monotonic() - self._since
            if idle < self._seconds:
                faulthandler.dump_traceback_later(self._seconds, file=STDERR)
                told = False
            elif not told:
                told = True
                faulthandler.cancel_dump_traceback_later()
                self._tell(idle)

    def _tell(self, idle: float) -> None:
        minutes, step = idle / 60, self._step
        where = f"rank {self._rank} on {platform.node()} has made no progress for {minutes:.1f} min after step {step}"
        try:
            path = self._write(where)
        except OSError as error:  # the file system may be what hangs
            self._hangs(step, f"{where}; its stacks could not be written: {error}")
        else:
            others = f"{path.parent}/stacks-rank-*"
            self._hangs(step, f"{where}; where each rank stands: {others} (a rank without such a file is frozen)")

    def _write(self, why: str) -> Path:
        self._logs.mkdir(exist_ok=True)  # without its parents: the run folder may have been renamed
        path = self._logs / f"stacks-rank-{self._rank}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return path
