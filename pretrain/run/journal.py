"""The journal of a run: `metrics.jsonl`, append-only, one JSON object a line. It is the truth; all else mirrors it.

A line counts once its newline is on disk, and ends with a checksum of what is before it. Kinds: metrics, start, end,
checkpoint, sample, warning, slowest, profile, rollback, and those in HEALTH. A line that is damaged is read as one of
kind `damaged`, whose `text` names it.
"""

import errno
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_pipeline.errors import RunError
from pretrain.metric_names import LOSS, ROLLBACKS

FORMAT = 2
"""Lines of format 1 have no checksum."""
MOST_TORN = 4096
"""Bytes of a torn line that are kept: a power loss may leave a block of zeros of any size."""
MOST_RECORDS = 4000
"""Of a kind in `series`: a picture has fewer columns."""
HEALTH = ("skipped", "spike", "straggler", "closed", "hang", "growth", "lead")
"""Kinds of what a run noticed about itself; each has a `text`, as `warning` and `rollback` do."""
ENVELOPE = ("format", "kind", "time", "attempt", "step", "metrics")
DIVERGED = "the run has diverged"
"""In the reason of an end: no step gave anything any more."""
NEEDED = {"end": "status", "rollback": "data", "spike": "spikes"}
"""What readers take from the fields of a kind without asking."""
_CHECKSUM = b', "crc32": "%08x"}'
_LENGTH = len(_CHECKSUM % 0)


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

    def metrics(self, step: int, metrics: dict[str, float], **fields: Any) -> None:
        """Record a step's metrics; the fields beside them must be JSON.

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
            values[ROLLBACKS] = float(self.num_rollbacks)
        self._append({"kind": "metrics", "step": step, "metrics": values} | fields)

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
        line = line_of(json.dumps(envelope | content, ensure_ascii=False, allow_nan=False))
        written = os.write(self._descriptor, line)
        if written < len(line):  # the disk is full
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of a journal line could be written")

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
            self.event("warning", text=text, torn=torn[:MOST_TORN].decode("utf-8", "backslashreplace"))


def line_of(text: str) -> bytes:
    """A line of a journal: the text of a JSON object, with its checksum."""
    body = text.encode("utf-8", "backslashreplace")[:-1]
    return body + _CHECKSUM % zlib.crc32(body) + b"\n"


def read(path: Path) -> Iterator[Record]:
    """All records of a journal; an unfinished last line is left out.

    Raises:
        RunError: there is no journal, or it was written by a newer version.
    """
    return (record for record, _ in read_from(path, 0))


def read_from(path: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """Records from a byte offset on, each with the offset behind it: what a follower keeps to go on from.

    What an attempt wrote behind lines of a later one that are read, too, is left out: it had stood still, and lost the
    run meanwhile.

    Raises:
        RunError: there is no journal, or it was written by a newer version.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no journal; a run folder has one once training has started")
    with open(path, "rb") as file:
        file.seek(offset)
        course, first = _Course(), 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                return
            try:
                record = _parse(line, path)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                first = first or _line_number(path, offset) - number
                text = f"{path.name}:{first + number}: a damaged line of the journal was passed over: {error!r}"
                record = Record("damaged", course.time, course.attempt, None, {}, {"text": text})
            if record.attempt < course.attempt:
                offset += len(line)
                continue
            if (lost := course.lost_before(record)) is not None:
                yield lost, offset
            offset += len(line)
            yield record, offset


def is_behind_a_line(path: Path, offset: int) -> bool:
    """Whether an offset that was kept still is where a line ends: a node that loses power may lose lines of a journal
    that a follower has read, and what is appended then has other ends."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, offset - 1))
            return offset == 0 or file.read(1) == b"\n"
    except FileNotFoundError:
        return False


def noting(records: Iterable[Record], damaged: list[str]) -> Iterator[Record]:
    """The records; of those that are damaged, the text goes into the list."""
    for record in records:
        if record.kind == "damaged":
            damaged.append(record.fields["text"])
        yield record


def told_damaged(damaged: list[str]) -> str:
    """One line about all of them."""
    return damaged[0] + (f"; and {len(damaged) - 1} more" if len(damaged) > 1 else "")


class _Course:
    """Where a journal stands. A start or a rollback whose line is damaged shows in the steps after it: else those that
    it superseded would be counted twice."""

    def __init__(self) -> None:
        self.time = self.attempt = 0
        self._step: int | None = None
        self._damaged = False

    def lost_before(self, record: Record) -> Record | None:
        """The start or rollback that must have been before this record."""
        lost = None
        self.time = record.time
        if record.kind == "damaged":
            self._damaged = True
        elif record.kind in ("start", "rollback"):
            self.attempt, self._step, self._damaged = record.attempt, record.fields.get("resumed_from"), False
        elif record.step is not None and LOSS in record.metrics:
            before = {
                "resumed_from": record.step - 1 or None,
                "text": f"back to before step {record.step}",
                "data": None,
            }
            if self._damaged and 0 < self.attempt < record.attempt:
                lost = Record("start", record.time, record.attempt, None, {}, before)
            elif self._damaged and self._step is not None and record.step <= self._step:
                lost = Record("rollback", record.time, record.attempt, None, {}, before)
            self.attempt, self._step = max(self.attempt, record.attempt), record.step
            self._damaged = self._damaged and lost is None
        return lost


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


def _parse(line: bytes, path: Path) -> Record:
    """Raises ValueError and its like for a line that is not as it was written; RunError: of a newer version."""
    whole = line.endswith(_CHECKSUM % zlib.crc32(line[: -_LENGTH - 1]) + b"\n")
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:  # also half a surrogate pair, which a text may hold; json knows what to do with it
        content = json.loads(line)
    if not whole and content["format"] != 1:
        raise ValueError("it does not match its checksum")
    if content["format"] not in (1, FORMAT):
        raise RunError(
            f"{path}: format {content['format']} of a journal is not known here; this version reads {FORMAT}"
        )
    content.pop("crc32", None)
    kind, moment, attempt, step = content["kind"], content["time"], content["attempt"], content.get("step")
    if not (isinstance(kind, str) and type(moment) is type(attempt) is int and (step is None or type(step) is int)):
        raise TypeError("kind, time, attempt or step is of a wrong type")
    metrics = content.get("metrics", {})
    if not whole and bool in map(type, metrics.values()):
        raise TypeError("a metric is no number")
    if kind in NEEDED and NEEDED[kind] not in content:
        raise KeyError(NEEDED[kind])
    return Record(
        kind=kind,
        time=moment,
        attempt=attempt,
        step=step,
        metrics={name: float(value) for name, value in metrics.items()},
        fields={name: value for name, value in content.items() if name not in ENVELOPE},
    )


def _line_number(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1
