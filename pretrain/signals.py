"""Signals that ask a run to stop: a handler only sets a flag, the loop saves at the next step's edge."""

import signal
from types import FrameType

EXIT_CODES = {signal.SIGUSR1: 0, signal.SIGINT: 130, signal.SIGTERM: 143}
"""USR1 is the planned stop before a time limit: a success."""


class StopRequest:
    """Remembers the last stop signal. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal, 0 while there is none."""
        for number in EXIT_CODES:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
