"""The numbers of a run against what can be measured from outside."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from pretrain.run.journal import Record, read
from pretrain.tracking.metrics import SLOW
from tests.conftest import RanksFailed
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
STEPS, LOG_EVERY, SAVE_EVERY, TOKENS, CONTEXT = 12, 4, 6, 128, 16


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        f"train.steps={STEPS}",
        f"train.log_every={LOG_EVERY}",
        f"train.checkpoint_every={SAVE_EVERY}",
        "train.eval_every=100",
        *more,
    ]


@pytest.fixture(scope="module")
def run(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, killed once after the first checkpoint."""
    run_dir = tmp_path_factory.mktemp("metrics") / "run"
    with pytest.raises(RanksFailed, match="-9"):
        ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, run_dir), die_at=10, wait_for_saves=True)
    ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, run_dir))
    return run_dir


def steps_of(run_dir: Path) -> list[Record]:
    return [r for r in read(run_dir / "metrics.jsonl") if r.kind == "metrics" and "loss/train" in r.metrics]


def flushes_of(run_dir: Path) -> list[Record]:
    return [r for r in steps_of(run_dir) if "time/step_ms" in r.metrics]


def test_every_step_tells_where_it_is_in_the_data(run: Path, dataset: Path) -> None:
    windows = len(Windows.of(Dataset.open(dataset), "train", CONTEXT))
    for record in steps_of(run):
        assert record.step is not None
        metrics = record.metrics
        assert metrics["data/tokens_seen"] == record.step * TOKENS
        assert metrics["data/samples_seen"] == record.step * TOKENS / CONTEXT
        assert metrics["data/epoch"] == record.step * TOKENS / CONTEXT / windows
        assert {"loss/train", "loss/total", "optim/lr", "optim/grad_norm", "penalty/l1"} <= metrics.keys()


def test_the_last_step_of_each_window_tells_of_the_window(run: Path) -> None:
    first = [r.step for r in flushes_of(run) if r.attempt == 1]
    second = [r.step for r in flushes_of(run) if r.attempt == 2]
    assert (first, second) == ([1, 4, 6, 8], [8, 12])
    shares = []
    for record in flushes_of(run):
        m = record.metrics
        parts = [m[f"time/{part}_ms"] for part in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
        shares.append(sum(parts) / m["time/step_ms"])
        assert m["time/tokens_per_second"] * m["time/step_ms"] / 1e3 == pytest.approx(TOKENS)
        assert m["time/tokens_per_second_per_device"] == m["time/tokens_per_second"] / 2
        assert 0 < m["system/memory_gib"] <= m["system/peak_memory_gib"] < 64
        assert m["optim/param_norm"] > 1
        assert 0 < m["optim/update_ratio"] < 1 or (
            record.step == STEPS and m["optim/lr"] == m["optim/update_ratio"] == 0
        )
        assert 1 <= m["time/rank_spread"] <= 2
        assert m["health/restarts"] == record.attempt - 1
        assert "health/skipped" not in m
        assert "time/mfu" not in m, "there is no peak for a CPU"
    assert max(shares) <= 1
    assert max(shares) > 1 / 4, "in every window, most of the time is of no part"


@pytest.fixture(scope="module")
def slow(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 1 is slow, so that whatever else the machine does takes little of a step."""
    run_dir = tmp_path_factory.mktemp("slow") / "run"
    ranks("tests.distributed.cases:slow_rank", 2, args=arguments(dataset, run_dir), slow=1, seconds=0.3)
    return run_dir


def test_step_time_is_the_clock_s(slow: Path) -> None:
    """The time between the records of two flushes, with no save in between; one may have been held up."""
    at = {record.step: record for record in flushes_of(slow)}
    measured = [(last - first) * at[last].metrics["time/step_ms"] for first, last in ((4, 6), (8, 12))]
    by_clock = [at[last].time - at[first].time for first, last in ((4, 6), (8, 12))]
    assert any(one == pytest.approx(other, rel=0.1) for one, other in zip(measured, by_clock, strict=True))


def test_the_stall_of_each_save_is_told(run: Path) -> None:
    stalls = {
        r.step: r.metrics["time/checkpoint_ms"]
        for r in read(run / "metrics.jsonl")
        if "time/checkpoint_ms" in r.metrics
    }
    assert stalls.keys() == {1, 6, 12}
    assert all(0.1 < stall < 60_000 for stall in stalls.values())


def test_goodput_counts_the_time_between_the_attempts_and_no_step_twice(run: Path) -> None:
    """From what a flush tells follows when it was, which is between the one before (or the start) and its record."""
    starts = [r for r in read(run / "metrics.jsonl") if r.kind == "start"]
    seconds: dict[int, float] = {}
    before = starts[0]
    for record in flushes_of(run):
        assert record.step is not None
        if record.attempt == 2 and record.step == 8:
            seconds.pop(8)  # what attempt 1 did after its checkpoint at step 6
            before = starts[1]
        steps = {1: 1, 4: 3, 6: 2, 8: 2, 12: 4}[record.step]
        seconds[record.step] = steps * record.metrics["time/step_ms"] / 1e3
        elapsed = sum(seconds.values()) / record.metrics["time/goodput"]
        assert before.time - 1 <= 1e3 * (starts[0].fields["started"] + elapsed) <= record.time + 1, "in ms"
        before = record
    assert 0 < record.metrics["time/goodput"] < 0.9


@pytest.mark.parametrize(("world", "mask_lr"), [(1, None), (2, 1e-2)])
def test_the_update_norm_is_that_of_the_change(ranks: Ranks, world: int, mask_lr: float | None) -> None:
    engines = [(0, "fp32"), *((stage, p) for stage in (1, 2, 3) for p in ("fp32", "bf16"))]
    for answers in ranks("tests.distributed.cases:update_ratios", world, engines=engines, mask_lr=mask_lr):
        for engine, answer in zip(engines, answers, strict=True):
            # The measured change is a difference of fp32 numbers, good to about 1e-7 of the parameter.
            assert answer["told"] == pytest.approx(answer["measured"], rel=1e-4), engine
            assert all(value > 0.01 for value in answer["told"][:-1]), engine
            assert answer["told"][-1] == 0, f"{engine}: a skipped step updates nothing"
            assert answer["laps"].keys() == {"forward", "backward", "reduce", "optimizer"}
            assert all(seconds > 0 for seconds in answer["laps"].values()), engine


def test_a_slow_rank_is_named_once(slow: Path) -> None:
    spreads = [(r.step, r.metrics["time/rank_spread"]) for r in flushes_of(slow)]
    assert all(1 <= spread <= 2 for _, spread in spreads)
    assert statistics.median(spread for _, spread in spreads) > 1.5
    [event] = [r for r in read(slow / "metrics.jsonl") if r.kind == "slowest"]
    assert (event.step, event.fields["ratio"]) == next(told for told in spreads if told[1] > SLOW)
    assert event.fields["rank"] == 1
    assert event.fields["host"]


def test_skipped_steps_are_counted(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the weights: from then on no gradient is finite."""
    args = arguments(dataset, tmp_path / "run", "optimizer.lr=1e30", "schedule.warmup_steps=0", "optimizer.clip=0")
    with pytest.raises(RanksFailed, match="not finite 10 steps in a row"):
        ranks("tests.distributed.cases:train_run", 1, args=args)
    skipped = 0.0
    for record in steps_of(tmp_path / "run"):
        skipped += record.metrics.get("optim/skipped", 0)
        if "time/step_ms" in record.metrics:
            assert record.metrics.get("health/skipped", 0) == skipped
            assert math.isfinite(record.metrics["time/goodput"])
    assert skipped == 10


@pytest.mark.parametrize(("stage", "own"), [(0, ["engine.py:_update"]), (1, []), (3, [])])
def test_nothing_of_ours_waits_for_the_device_between_flushes(
    ranks: Ranks, dataset: Path, tmp_path: Path, stage: int, own: list[str]
) -> None:
    """Stage 0 checks the norm itself; `largest` reads a CPU tensor, and its being seen proves that the watch works."""
    args = arguments(dataset, tmp_path / "run", f"engine.zero_stage={stage}")
    for found in ranks("tests.distributed.cases:host_waits", 2, args=args):
        assert found == ["distributed.py:largest", *own]


def test_a_wait_would_be_seen(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run")
    [found] = ranks("tests.distributed.cases:host_waits", 1, args=args, sabotage=True)
    assert found == ["sabotage.py:learning_rate"]
