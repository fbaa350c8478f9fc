"""What every program of ours does on a terminal. Standard library only.

While nothing else is said a line says what goes on, and for how long: `Waiting … 3 s` appears after a second of
silence, counts, and is gone before the next word. And no word is broken where a line is too long.
"""

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

TICK_SECONDS = 1.0
USUAL_WIDTH = 80
_WORDS = re.compile(r" *(?:\S*`[^`]*`\S*|\S+)")
_LABEL = re.compile(r" *\S+(?: \S+)* {2,}")
JSON = ('{"', "[{", '["')
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class StatusLine:
    """Watches what is written to a terminal, and writes there itself when nothing else is."""

    def __init__(self, terminal: int, what: str) -> None:
        """`terminal`: a file descriptor, which stays the caller's."""
        self._terminal = terminal
        self._doing = [(what, time.monotonic())]
        self._last_word = time.monotonic()
        self._shown = False
        self._within_line = False
        self._lock = threading.RLock()  # a signal's handler may print while a print is under way
        self._ended = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def watch(self, stream: TextIO) -> None:
        """What is written to `stream` counts, as long as that is a terminal."""
        write = stream.write

        def watched(text: str) -> int:
            if not stream.isatty():
                return write(text)
            with self._lock:
                self._clear()
                self._last_word = time.monotonic()
                begins = not self._within_line
                if shown := _ESCAPES.sub("", text):
                    self._within_line = shown[-1] not in "\r\n"
                if begins and shown == text:  # else it has been laid out, or is under way
                    text = fit(text, self._width())
                return write(text)

        stream.write = watched  # type: ignore[method-assign]

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says `what` while the context lasts."""
        self._doing.append((what, time.monotonic()))
        try:
            yield
        finally:
            self._doing.pop()

    def end(self) -> None:
        """Leave the terminal as it was."""
        with self._lock:
            self._ended.set()
            self._clear()

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS / 4):
            with self._lock:
                quiet = time.monotonic() - self._last_word >= TICK_SECONDS
                if not quiet or self._within_line or self._ended.is_set():
                    continue
                what, since = self._doing[-1]
                self._shown = True
                self._write(f"{what} … {time.monotonic() - since:.0f} s")
                self._last_word = time.monotonic()

    def _clear(self) -> None:
        if self._shown:
            self._shown = False
            self._write("")

    def _write(self, text: str) -> None:
        try:
            os.write(self._terminal, f"\r\x1b[K{text[: self._width() - 1]}".encode(errors="replace"))
        except OSError:  # the terminal is gone, which whoever has something to say will notice
            self._ended.set()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._terminal).columns or USUAL_WIDTH
        except OSError:
            return USUAL_WIDTH


def fit(text: str, width: int, end: str = "") -> str:
    """Lines that are too long, broken at spaces, but not within a command in backticks; the rest of a line stands below
    its second column. `end` is put where one is broken: a backslash keeps a command one. JSON stays as it is."""
    return "\n".join(_fit_line(line, width, end) for line in text.split("\n"))


def _fit_line(line: str, width: int, end: str) -> str:
    if len(line) <= width or line.startswith(JSON):
        return line
    label = _LABEL.match(line)
    indent = " " * (label.end() if label and label.end() <= width // 2 else 0)
    lines, now = list[str](), ""
    for word in _WORDS.findall(line):
        if now.strip() and len(now) + len(word) + len(end) > width:
            lines.append(now + end)
            now = indent + word.lstrip()
        else:
            now += word
    return "\n".join([*lines, now])


def harmless(text: str) -> str:
    """A text that does not steer a terminal: its control characters, but tabs and newlines, as JSON has them."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show(text: str, end: str = "\n") -> None:
    """Print a text that is not ours: to a terminal as `harmless`, elsewhere as it is."""
    print(harmless(text) if sys.stdout.isatty() else text, end=end, flush=True)


_line: StatusLine | None = None


def begin(what: str) -> None:
    """From now on no silence of this process is longer than two seconds, if its error stream is a terminal."""
    global _line
    if _line is None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        _line = StatusLine(os.dup(sys.stderr.fileno()), what)  # a rank sends its error stream elsewhere
        atexit.register(end)
        for stream in (sys.stdout, sys.stderr):
            watch(stream)


def watch(stream: TextIO) -> None:
    """What is written to `stream` is a word, too."""
    if _line is not None:
        _line.watch(stream)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says `what` when it takes long."""
    if _line is None:
        yield
        return
    with _line.doing(what):
        yield


def end() -> None:
    """Others have the terminal from now on."""
    global _line
    if _line is not None:
        _line.end()
        _line = None
