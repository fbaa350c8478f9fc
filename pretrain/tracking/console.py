"""What rank 0 shows: lines that align. Colour and a status line on a terminal, plain lines in a file.

Only rank 0 has the screen, and only with its own words: `take_over` sends all else into the run folder's logs.
"""

import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from pretrain import status_line
from pretrain.metric_names import COLUMNS, STEP_MS, Column, Metric
from pretrain.tracking.durations import duration

HEADER_EVERY = 20
WINDOW = 50
"""Calls of `step` over which the time left is estimated."""
LEFT_WIDTH = 9
PROGRESS_SECONDS = 10.0
SILENT_SECONDS = 2.0
"""Without a line, after which the status line says for how long."""
COMMANDS = ("served by", "resume")
"""Rows of the summary that are to be copied into a shell."""
LEFT_OUT_FIRST = ("GiB", "l1", "entropy", "grad", "lr")
"""Columns that a narrow terminal has no room for."""
VALIDATION_LABEL = "validation"
STYLES = {
    "header": "bold",
    "step": "",
    "validation": "bold green",
    "note": "cyan",
    "warning": "bold yellow",
    "bad": "bold red",
}


class Screen:
    """Rank 0's way to the user, and a plain copy of all that goes there in its log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.out, self.err = (_duplicate(stream) for stream in (sys.stdout, sys.stderr))
        for stream in (self.out, self.err):
            status_line.watch(stream)
        self._copy = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = self._length()

    def others_wrote(self) -> bool:
        """Whether somebody else has written to the log since this was asked, or since the last copy."""
        before, self._size = self._size, self._length()
        return before != self._size

    def copy(self, text: str) -> None:
        """Append lines to the log. A disk that refuses them is no reason to say nothing on the screen, nor to end."""
        with suppress(OSError):
            os.write(self._copy, f"{text}\n".encode("utf-8", "backslashreplace"))
            self._size = self._length()

    def _length(self) -> int:
        return os.fstat(self._copy).st_size


_screen: Screen | None = None


def take_over(logs: Path, rank: int, *, verbose: bool) -> None:
    """Send all that this process prints, C++ included, to `logs/rank-N.log`; `Console` and `fail` keep the screen.

    With `verbose` the libraries keep rank 0's screen, too.

    Raises:
        OSError: the log cannot be written.
    """
    global _screen
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"rank-{rank}.log"
    if rank == 0:
        _screen = Screen(log)
        sys.excepthook = lambda kind, error, trace: fail(
            "".join(traceback.format_exception(kind, error, trace)).rstrip()
        )
    if rank or not verbose:
        with open(log, "ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def fail(text: str) -> None:
    """Say what ends the run, on the error stream and in the log. Where nobody can be told, the exit code still is."""
    with suppress(OSError):  # a closed pipe, or a log on the disk that is full
        print(text, file=_screen.err if _screen else sys.stderr, flush=True)
    if _screen:
        _screen.copy(text)


def log_traceback() -> None:
    """The error that is being handled, with its traceback, into the log; a disk that is full has no room for it."""
    with suppress(OSError):
        traceback.print_exc()


class Console:
    """Shows a run of `total_steps` steps. Close it, or use it as a context: the status line hides the cursor.

    Writes to `file`, or else to the screen with a copy in the log of rank 0. Safe to call from several threads.
    """

    def __init__(self, total_steps: int, file: TextIO | None = None) -> None:
        self._total = total_steps
        self._screen = None if file else _screen
        self._file = file or (_screen.out if _screen else sys.stdout)
        terminal = Terminal(file=self._file, highlight=False, soft_wrap=True)
        self._terminal = terminal if terminal.is_terminal and not terminal.is_dumb_terminal else None
        self._live: Live | None = None
        self._status = (0.0, "", 0.0)
        self._columns: list[tuple[Metric, Column]] = []
        self._lines_since_header = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._warned: set[str] = set()
        self._gone = False
        self._began = self._told = 0.0
        """When a validation began, and when a line told how far it was."""
        self._printing = threading.RLock()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """A line of a step's metrics: of the known ones, those that are there."""
        self._times.append((step, time.monotonic()))
        columns = self._fitting([(metric, column) for metric, column in COLUMNS if metric in metrics])
        repeat = self._terminal is not None and self._lines_since_header >= HEADER_EVERY
        if columns != self._columns or repeat:
            self._columns = columns
            self._lines_since_header = 0
            titles = "".join(f"{column.title:>{column.width}}" for _, column in columns)
            self._print(f"{'step':>{self._step_width}}{titles}{'left':>{LEFT_WIDTH}}", "header")
        self._lines_since_header += 1
        values = "".join(f"{_number(column, metrics[metric]):>{column.width}}" for metric, column in columns)
        left = self._time_left(step, metrics)
        finite = all(math.isfinite(metrics[metric]) for metric, _ in columns)
        self._print(f"{self._position(step)}{values}{left:>{LEFT_WIDTH}}", "step" if finite else "bad")
        self._show_status(step, left)

    def validating(self, step: int, done: int, total: int) -> None:
        """So many batches of a validation are done: a bar on a terminal, else a line every ten seconds."""
        now = time.monotonic()
        if not done:
            self._began = self._told = now
        left = f"{duration((total - done) * (now - self._began) / done)} left" if done else ""
        self._show_bar(done / total, f"{VALIDATION_LABEL}  {left}")
        if self._terminal is None and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._print(f"{self._position(step)}  {VALIDATION_LABEL}   {done / total:.0%}   {left}", "note")

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """A line of a validation's results, but for those of single masks, such as `gate/flips/enc_ff/00`."""
        shown = [
            (name.partition("/")[2].removeprefix("val_").replace("_", " "), value)
            for name, value in metrics.items()
            if name.count("/") == 1
        ]
        if self._live and step >= self._total:
            self.close()
        text = "   ".join(f"{'loss' if name == 'val' else name} {value:.4f}" for name, value in shown)
        self._print(f"{self._position(step)}  {VALIDATION_LABEL}   {text}", "validation")

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._print(text, "note")

    def warning(self, text: str) -> None:
        """Something the user should know; each text is shown once."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(f"warning: {text}", "warning")

    def summary(self, rows: list[tuple[str, str]]) -> None:
        """What is left to say at the end: (label, text), the first ten."""
        self.close()
        rows = rows[:10]
        width = max((len(label) for label, _ in rows), default=0)
        self._print("", "note")
        for label, text in rows:
            self._print(f"{label:<{width}}  {text}", "step", end=" \\" if label in COMMANDS else "")

    def close(self) -> None:
        """Take the status line away and give the cursor back."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _step_width(self) -> int:
        return 2 * len(str(self._total)) + 1

    def _position(self, step: int) -> str:
        return f"{f'{step}/{self._total}':>{self._step_width}}"

    def _time_left(self, step: int, metrics: dict[str, float]) -> str:
        (first, since), (last, now) = self._times[0], self._times[-1]
        if last > first:
            return duration((self._total - step) * (now - since) / (last - first))
        if STEP_MS in metrics:
            return duration((self._total - step) * metrics[STEP_MS] / 1e3)
        return "-"

    def _show_status(self, step: int, left: str) -> None:
        if step < self._total:
            self._show_bar(step / self._total, f"{left} left")
        else:
            self.close()

    def _show_bar(self, share: float, words: str) -> None:
        if self._terminal is None:
            return
        self._status = (share, words, time.monotonic())
        if self._live:
            self._live.refresh()
        else:
            self._live = Live(
                get_renderable=self._bar,
                console=self._terminal,
                refresh_per_second=1,
                transient=True,
                redirect_stdout=False,  # else it brings back to the screen what `take_over` keeps from it
                redirect_stderr=False,
            )
            self._live.start()

    def _bar(self) -> Text:
        """How far the run is; and the seconds since it said so, where those are many."""
        share, words, since = self._status
        full, age = round(30 * share), time.monotonic() - since
        text = f"  {share:4.0%}  {words}" + (f", {age:.0f} s ago" if age >= SILENT_SECONDS else "")
        return Text.assemble(("━" * full, "green"), ("━" * (30 - full), "bright_black"), text)

    def _fitting(self, columns: list[tuple[Metric, Column]]) -> list[tuple[Metric, Column]]:
        """Those that the terminal is wide enough for; the journal has them all."""
        if self._terminal is None:
            return columns
        left = self._terminal.width - self._step_width - LEFT_WIDTH
        for title in (*LEFT_OUT_FIRST, None):
            if sum(column.width for _, column in columns) <= left:
                break
            columns = [(metric, column) for metric, column in columns if column.title != title]
        return columns

    def _print(self, text: str, style: str, end: str = "") -> None:
        if self._gone:
            return
        text = _printable(text, self._file)
        with self._printing:
            if self._screen:
                if self._screen.others_wrote():
                    self.warning(f"the libraries' own messages are in {self._screen.log}; --verbose shows them here")
                self._screen.copy(text)
            try:
                if self._terminal:
                    text = status_line.fit(text, self._terminal.width, end)
                    self._terminal.print(Text(text, style=STYLES[style]))
                else:
                    self._file.write(text + "\n")
                    self._file.flush()
            except OSError:  # a closed pipe or terminal is no reason to stop training; the journal has it all
                self._gone = True


def slow_progress() -> Callable[[str, int, int], None]:
    """Tells of work before the first step, (what, done, in all), if it is long: a line every ten seconds."""
    console, told = Console(1), time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            console.note(f"{what}: {done / total:.0%}")

    return show


def _duplicate(stream: TextIO) -> TextIO:
    return open(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="backslashreplace")


def _number(column: Column, value: float) -> str:
    return format(value, column.digits or (".4f" if abs(value) >= 1e-3 or value == 0 else ".2e"))


def _printable(text: str, file: TextIO) -> str:
    """Text of a model or a server must not steer the terminal, and a log file may know ASCII only."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    encoding = file.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)
