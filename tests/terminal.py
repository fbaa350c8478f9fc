"""A program on a pseudo-terminal of 80 columns, as a user has it."""

import fcntl
import os
import pty
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

COLUMNS = 80


class Seen(NamedTuple):
    """What a user has seen of a program."""

    code: int
    text: str
    silence: float
    """The longest, in seconds."""


def on_terminal(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Seen:
    """Run a command to its end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe(command[0], list(command), {**environment, "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    text, silence, last = b"", 0.0, time.monotonic()
    while part := _read(terminal):
        now = time.monotonic()
        text, silence, last = text + part, max(silence, now - last), now
    silence = max(silence, time.monotonic() - last)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return Seen(code, text.decode(errors="replace"), silence)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # so Linux says that nobody has the other end any more
        return b""
