"""The journal of a run: `metrics.jsonl`, append-only, one JSON object a line. It is the truth; all else mirrors it.

A line counts once its newline is on disk. Kinds: metrics, start, end, checkpoint, sample, warning, slowest, profile,
rollback, and those in HEALTH.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import RunError

FORMAT = 1
HEALTH = ("skipped", "spike", "straggler", "hang", "growth")
"""Kinds of what a run noticed about itself; each has a `text`, as `warning` and `rollback` do."""
ENVELOPE = ("format", "kind", "time", "attempt", "step", "metrics")


@dataclass(frozen=True)
class Record:
    """One line. `time` is in milliseconds since the epoch; `fields` holds what only this kind has."""

    kind: str
    time: int
    attempt: int
    step: int | None
    metrics: dict[str, float]
    fields: dict[str, Any]


class Point(NamedTuple):
    """One value of a metric; `time` in milliseconds since the epoch."""

    step: int
    value: float
    attempt: int
    time: int


class Journal:
    """Appends to a run's journal. Each record is a single write, so threads and a crash never mix two lines.

    `num_nonfinite` counts the metric values that were nan or infinite. Once `num_rollbacks` of the run is not 0, it is
    beside all metrics, to tell superseded points from those that replaced them within one attempt.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self.num_nonfinite = 0
        self.num_rollbacks = 0
        self._attempt = attempt
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics.

        Raises:
            OSError: the line could not be written whole; nothing of it stays.
        """
        values: dict[str, float | str] = {}
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                values[name] = number
            else:  # strict JSON has no nan
                values[name] = str(number)
                self.num_nonfinite += 1
        if self.num_rollbacks:
            values["health/rollbacks"] = float(self.num_rollbacks)
        self._append({"kind": "metrics", "step": step, "metrics": values})

    def event(self, kind: str, **fields: Any) -> None:
        """Record anything else; the fields must be JSON.

        Raises:
            OSError: the line could not be written whole; nothing of it stays.
        """
        self._append({"kind": kind} | fields)

    def sync(self) -> None:
        """Have all records so far on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Have all records on disk and let go of the file."""
        self.sync()
        os.close(self._descriptor)

    def _append(self, content: dict[str, Any]) -> None:
        envelope = {"format": FORMAT, "time": time.time_ns() // 1_000_000, "attempt": self._attempt}
        line = json.dumps(envelope | content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
        written = os.write(self._descriptor, line + b"\n")
        if written <= len(line):  # the disk is full
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line) + 1} bytes of a journal line could be written")

    def _cut_torn_line(self) -> None:
        """A crash can leave the beginning of a line at the end: take it out, and keep its text in a warning."""
        size = os.fstat(self._descriptor).st_size
        tail = b""
        while len(tail) < size and b"\n" not in tail:
            length = min(1 << 16, size - len(tail))
            tail = os.pread(self._descriptor, length, size - len(tail) - length) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn:
            os.ftruncate(self._descriptor, size - len(torn))
            text = f"journal: took out an unfinished line of {len(torn)} bytes, left by a crash"
            self.event("warning", text=text, torn=torn.decode("utf-8", "backslashreplace"))


def read(path: Path) -> Iterator[Record]:
    """All records of a journal; an unfinished last line is left out.

    Raises:
        RunError: there is no journal, or a line in it is broken; names the line.
    """
    return (record for record, _ in read_from(path, 0))


def read_from(path: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """Records from a byte offset on, each with the offset behind it: what a follower keeps to go on from.

    Raises:
        RunError: there is no journal, or a line in it is broken; names the line.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no journal; a run folder has one once training has started")
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = _parse(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(f"{path}:{_line_number(path, offset)}: not a line of a journal: {error!r}") from error
            offset += len(line)
            yield record, offset


def series(records: Iterable[Record]) -> dict[str, list[Point]]:
    """The points of each metric in the order they were recorded, without those that a rollback superseded.

    An attempt that resumed from step s supersedes what older ones recorded after s, as does a rollback to s within an
    attempt; one from scratch, all of it.
    """
    points: dict[str, list[Point]] = {}
    for record in records:
        if record.kind in ("start", "rollback"):
            resumed_from = record.fields.get("resumed_from")
            for name, kept in points.items():
                points[name] = [] if resumed_from is None else [p for p in kept if p.step <= resumed_from]
        elif record.step is not None:
            for name, value in record.metrics.items():
                points.setdefault(name, []).append(Point(record.step, value, record.attempt, record.time))
    return {name: kept for name, kept in points.items() if kept}


def _parse(line: bytes) -> Record:
    content = json.loads(line)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']} is not known here; this version reads {FORMAT}")
    return Record(
        kind=content["kind"],
        time=content["time"],
        attempt=content["attempt"],
        step=content.get("step"),
        metrics={name: float(value) for name, value in content.get("metrics", {}).items()},
        fields={name: value for name, value in content.items() if name not in ENVELOPE},
    )


def _line_number(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1
