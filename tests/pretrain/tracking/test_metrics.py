"""Goodput on journals with rollbacks and downtime; the stopwatch against a clock."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.profiling import Stopwatch
from pretrain.run.goodput import Goodput, earlier_goodput
from pretrain.run.journal import Journal, Record, read


def start(attempt: int, at: float, resumed_from: int | None = None, **fields: Any) -> Record:
    return Record("start", int(at * 1e3), attempt, None, {}, {"resumed_from": resumed_from} | fields)


def window(attempt: int, first: int, last: int, step_ms: float, skipped: tuple[int, ...] = ()) -> list[Record]:
    """One line a step; the last one has the mean step time."""
    return [
        Record(
            "metrics",
            0,
            attempt,
            step,
            {"loss/train": 1.0}
            | ({"optim/skipped": 1.0} if step in skipped else {})
            | ({"time/step_ms": step_ms} if step == last else {}),
            {},
        )
        for step in range(first, last + 1)
    ]


def test_the_first_attempt_starts_from_nothing() -> None:
    assert earlier_goodput([], 0, started=1000.0) == Goodput(1000.0, 0.0)


def test_a_rollback_and_downtime() -> None:
    records = [
        start(1, at=1010.0, started=1000.0),
        *window(1, 1, 10, step_ms=100.0),
        *window(1, 11, 20, step_ms=200.0),  # superseded: the next attempt begins at 10
        *window(1, 21, 22, step_ms=200.0)[:1],  # killed before its window was told
        start(2, at=1500.0, resumed_from=10, started=1490.0),
        Record("metrics", 0, 2, 10, {"loss/val": 1.0}, {}),
        *window(2, 11, 20, step_ms=300.0),
        *window(2, 21, 30, step_ms=500.0),
    ]
    assert earlier_goodput(records, 30, started=2000.0) == Goodput(1000.0, 1.0 + 3.0 + 5.0)
    assert earlier_goodput(records, 20, started=2000.0) == Goodput(1000.0, 1.0 + 3.0), "step 30 was damaged, say"
    assert earlier_goodput(records, 0, started=2000.0) == Goodput(1000.0, 0.0), "from scratch"


def test_skipped_steps_are_not_productive() -> None:
    records = [start(1, at=1000.0), *window(1, 1, 10, step_ms=100.0, skipped=(3, 10))]
    assert earlier_goodput(records, 10, started=1100.0) == Goodput(1000.0, pytest.approx(0.8))  # type: ignore[arg-type]


def test_share_is_of_wall_time() -> None:
    before = time.time()
    goodput = Goodput(started=before - 100.0, productive=30.0)
    goodput.add(20.0)
    share, after = goodput.share(), time.time()
    assert 50 / (100 + after - before) <= share <= 50 / 100


def test_a_journal_on_disk_reads_the_same(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    journal.event("start", resumed_from=None, started=123.0)
    journal.metrics(1, {"loss/train": float("nan")})
    journal.metrics(2, {"loss/train": 1.0, "time/step_ms": 50.0})
    journal.close()
    assert earlier_goodput(read(tmp_path / "metrics.jsonl"), 2, started=200.0) == Goodput(123.0, 0.1)


def test_the_stopwatch_sums_each_part_and_nothing_in_between() -> None:
    """Between what went by inside of the calls around a part, and what went by outside of them."""
    watch, clock = Stopwatch(torch.device("cpu")), time.perf_counter
    least, most = {"data": 0.0, "forward": 0.0}, {"data": 0.0, "forward": 0.0}
    for _ in range(3):
        before = clock()
        watch.start()
        began = clock()
        for part, seconds in (("data", 0.02), ("forward", 0.01)):
            time.sleep(seconds)
            ended = clock()
            watch.lap(part)
            after = clock()
            least[part] += ended - began
            most[part] += after - before
            before, began = ended, after
        time.sleep(0.005)  # of no part
    parts = watch.read()
    assert set(parts) == {"data", "forward"}
    assert all(least[part] <= seconds <= most[part] for part, seconds in parts.items())
    assert watch.read() == {}
