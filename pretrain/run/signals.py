"""Requests that a run stop: a handler only sets a flag, the loop saves at the next step's edge."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGTERM: 143}
"""USR1 is the planned stop before a time limit: a success."""
KILL_SWITCH = 254
"""Greater than any signal: the kill switch is there. A success, too."""
LONGEST_SECONDS = 600
"""What may follow the end of a run for so long: the report, above all. The devices are idle meanwhile."""


class BrokenOff(BaseException):
    """What follows the end of a run is left: a signal came, or it took too long."""


class StopRequest:
    """Remembers the last stop signal. A second Ctrl-C ends the process at once. Make it before there are threads."""

    def __init__(self) -> None:
        self.code: int | None = None
        """Exit code of a run whose end is recorded: nothing that follows can change it."""
        self.broken_off = False
        """What follows the end was."""
        self._signal = 0
        for number in EXIT_CODES:
            signal.signal(number, self._receive)
        # A rank of `duet train` is born with all of them blocked: none is lost, or its end, before it can be heard.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
        # srun sends USR1 to all processes of a rank. Compilers and the mirror would die of it; what is blocked here is
        # blocked for threads and children, too, and waits until it is asked for.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    @property
    def signal(self) -> int:
        """Number of the signal, 0 while there is none."""
        if signal.sigtimedwait({signal.SIGUSR1}, 0) and not self._signal:
            self._signal = signal.SIGUSR1
        return self._signal

    def ended(self, request: int) -> None:
        """The end of the run is recorded; `request` is what it ended for."""
        self.code = exit_code(request)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """For what follows the end: the next signal, or its taking too long, raises `BrokenOff`. Later ones do not."""
        numbers = (*EXIT_CODES, signal.SIGALRM)

        def break_off(number: int, frame: FrameType | None) -> None:
            self.broken_off = True
            _ignore(numbers)
            raise BrokenOff(f"longer than {LONGEST_SECONDS} s" if number == signal.SIGALRM else f"signal {number}")

        for number in numbers:
            signal.signal(number, break_off)
        signal.alarm(LONGEST_SECONDS)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            yield
        finally:
            signal.alarm(0)
            _ignore(numbers)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


def _ignore(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def exit_code(request: int) -> int:
    """Of a run that ended because of a request; 0 for none."""
    return 0 if request in (0, KILL_SWITCH) else EXIT_CODES[signal.Signals(request)]


def told(request: int) -> str:
    """Why a run ended early."""
    return "kill switch" if request == KILL_SWITCH else f"signal {request}"
