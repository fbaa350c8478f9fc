"""Requests that a run stop: a handler only sets a flag, the loop saves at the next step's edge."""

import signal
from types import FrameType

EXIT_CODES = {signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGTERM: 143}
"""USR1 is the planned stop before a time limit: a success."""
KILL_SWITCH = 254
"""Greater than any signal: the kill switch is there. A success, too."""


class StopRequest:
    """Remembers the last stop signal. A second Ctrl-C ends the process at once. Make it before there are threads."""

    def __init__(self) -> None:
        self._signal = 0
        for number in EXIT_CODES:
            signal.signal(number, self._receive)
        # srun sends USR1 to all processes of a rank. Compilers and the mirror would die of it; what is blocked here is
        # blocked for threads and children, too, and waits until it is asked for.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    @property
    def signal(self) -> int:
        """Number of the signal, 0 while there is none."""
        if signal.sigtimedwait({signal.SIGUSR1}, 0) and not self._signal:
            self._signal = signal.SIGUSR1
        return self._signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


def exit_code(request: int) -> int:
    """Of a run that ended because of a request; 0 for none."""
    return 0 if request in (0, KILL_SWITCH) else EXIT_CODES[signal.Signals(request)]


def told(request: int) -> str:
    """Why a run ended early."""
    return "kill switch" if request == KILL_SWITCH else f"signal {request}"
