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

import orjson

from data_pipeline.errors import RunError

FORMAT = 1
MOST_RECORDS = 4000
"""Of a kind in `series`: a picture has fewer columns."""
HEALTH = ("skipped", "spike", "straggler", "hang", "growth", "lead")
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


class _Thinned:
    """Records of the same metrics, evenly thinned out while they come in: at most `MOST_RECORDS`, and the last."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Record]] = []
        self._last: list[tuple[int, Record]] = []
        self._stride = 1
        self._count = 0

    def add(self, number: int, record: Record) -> None:
        if self._count % self._stride == 0:
            self._kept.append((number, record))
            if len(self._kept) > MOST_RECORDS:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1
        self._last = [(number, record)]

    def supersede(self, after: float) -> None:
        """Forget the steps after one."""
        kept = [(n, r) for n, r in self.numbered() if r.step is not None and r.step <= after]
        self._kept, self._last, self._count = kept, kept[-1:], len(kept) * self._stride

    def numbered(self) -> list[tuple[int, Record]]:
        return self._kept + [last for last in self._last if self._kept[-1:] != [last]]


def series(records: Iterable[Record]) -> dict[str, list[Point]]:
    """The points of each metric in the order they were recorded, without those that a rollback superseded.

    An attempt that resumed from step s supersedes what older ones recorded after s, as does a rollback to s within an
    attempt; one from scratch, all of it.
    Of more than `MOST_RECORDS` lines that hold the same metrics, an even selection and the last one are kept: a run of
    a million steps needs no more memory than one of a few thousand.
    """
    groups: dict[tuple[str, ...], _Thinned] = {}
    for number, record in enumerate(records):
        if record.kind in ("start", "rollback"):
            resumed_from = record.fields.get("resumed_from")
            for group in groups.values():
                group.supersede(-math.inf if resumed_from is None else resumed_from)
        elif record.step is not None and record.metrics:
            groups.setdefault(tuple(record.metrics), _Thinned()).add(number, record)
    points: dict[str, list[Point]] = {}
    for _, record in sorted((pair for group in groups.values() for pair in group.numbered()), key=lambda pair: pair[0]):
        assert record.step is not None
        for name, value in record.metrics.items():
            points.setdefault(name, []).append(Point(record.step, value, record.attempt, record.time))
    return points


def _parse(line: bytes) -> Record:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:  # also half a surrogate pair, which a text may hold; json knows what to do with it
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
