"""The judgements a run makes about itself, as functions of numbers."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from duet_pretrain import SOURCE
from pretrain.config.schema import load
from pretrain.config.sections import HealthConfig
from pretrain.health import trends
from pretrain.health.rollback import read_past
from pretrain.health.spikes import Spikes, StepLoss
from pretrain.health.trends import Closed, Growth, Straggler
from pretrain.run.goodput import earlier_goodput
from pretrain.run.journal import HEALTH, Journal, Record, read, series
from pretrain.tracking.metrics import Slowest

WINDOW = 100


def falling(steps: int, seed: int) -> np.ndarray:
    """Losses like those of a run: a fast fall from 10, a slow one later, and the noise of the batches."""
    step = np.arange(steps)
    return 2 + 5 * np.exp(-step / 50) + 3 * np.exp(-step / 1500) + np.random.default_rng(seed).normal(0, 0.03, steps)


def judged(losses: np.ndarray, log_every: int, threshold: float = 6.0) -> list[int]:
    spikes = Spikes(threshold, WINDOW)
    steps = [StepLoss(step, float(loss), True) for step, loss in enumerate(losses)]
    return [spike.step for i in range(0, len(steps), log_every) for spike in spikes.judge(steps[i : i + log_every])]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("log_every", [1, 10, 100])
def test_a_falling_noisy_loss_has_no_spikes_and_a_jump_is_one(seed: int, log_every: int) -> None:
    losses = falling(4000, seed)
    assert judged(losses, log_every) == []
    losses[[1717, 3001]] += 1.0
    assert judged(losses, log_every) == [1717, 3001]
    assert judged(losses, log_every, threshold=1.0) != [1717, 3001], "the threshold counts"


@settings(max_examples=50)
@given(scale=st.floats(0.1, 10), z=st.floats(-20, 20), seed=st.integers(0, 99))
def test_what_is_a_spike_does_not_depend_on_the_unit(scale: float, z: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, WINDOW)
    found = []
    for unit in (1.0, scale):
        spikes = Spikes(6.0, WINDOW)
        spikes.judge([StepLoss(step, float(unit * (3 + x)), True) for step, x in enumerate(noise)])
        found += spikes.judge([StepLoss(WINDOW, unit * (3 + 0.1 * z), True)])
    assert len(found) in (0, 2)
    if found:
        assert found[0].z == pytest.approx(found[1].z)
    if abs(z) > 12:
        assert bool(found) == (z > 0), "upward only"


def test_nothing_is_a_spike_before_the_window_is_full_and_what_is_not_finite_never() -> None:
    spikes = Spikes(6.0, WINDOW)
    assert spikes.judge([StepLoss(step, 3.0 + step % 2 / 10, True) for step in range(WINDOW - 1)]) == []
    assert spikes.judge([StepLoss(WINDOW, 1e9, True)]) == []
    assert spikes.judge([StepLoss(WINDOW + 1, loss, False) for loss in (math.nan, math.inf)]) == []
    assert math.isfinite(spikes.limit)
    assert len(spikes.judge([StepLoss(WINDOW + 2, 1e9, False)])) == 1


def test_a_spike_among_the_recent_losses_hides_no_other_and_a_skipped_one_is_forgotten() -> None:
    spikes = Spikes(6.0, WINDOW)
    steps = [StepLoss(step, float(loss), True) for step, loss in enumerate(falling(1000, 0)[-300:])]
    spikes.judge(steps)
    before = spikes.limit
    assert spikes.judge([StepLoss(300, 50.0, False)])
    assert spikes.limit == before
    assert spikes.judge([StepLoss(301, 50.0, True)])
    assert spikes.limit < before + 0.1
    assert spikes.judge([StepLoss(302, 50.0, True)])


def write_run(path: Path) -> None:
    """Steps 1 to 20, back to the checkpoint of step 12, and on to step 16; logged every four steps."""
    journal = Journal(path, 1)
    journal.event("start", resumed_from=None, started=1000.0)
    for first, last in ((1, 20), (13, 16)):
        for step in range(first, last + 1):
            window = {"time/step_ms": 1000.0} if step % 4 == 0 else {}
            journal.metrics(step, {"loss/train": float(step)} | window)
        if last == 20:
            journal.event("checkpoint", step=12, path="checkpoints/step-000000012")
            journal.event("spike", step=18, text="a spike", spikes=[{"step": 18}])
            journal.event("rollback", step=20, text="back", resumed_from=12, data={"samples_seen": 160})
            journal.num_rollbacks = 1
    journal.close()


def test_a_rollback_supersedes_points_within_an_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    points = series(read(path))
    assert [p.step for p in points["loss/train"]] == list(range(1, 17))
    assert [p.step for p in points["health/rollbacks"]] == [13, 14, 15, 16], "so MLflow can tell them apart"
    assert earlier_goodput(read(path), 16, 0.0).productive == pytest.approx(16.0)
    assert earlier_goodput(read(path), 12, 0.0).productive == pytest.approx(12.0)


@pytest.mark.parametrize(("step", "saved", "data"), [(12, None, 160), (12, 12, None), (16, 16, None), (4, None, None)])
def test_what_the_next_attempt_knows_of_a_rollback(
    tmp_path: Path, step: int, saved: int | None, data: int | None
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    if saved:
        Journal(path, 1).event("checkpoint", step=saved, path="x")
    past = read_past(read(path), step, HealthConfig(spike_window=8))
    assert (past.num_rollbacks, past.num_spikes) == (1, 1)
    assert (past.data or {}).get("samples_seen") == data


def logged(journal: Journal, spikes: Spikes, after: int, until: int) -> float:
    """Steps in windows of twenty, every seventh without an update. Returns the limit that there is then."""
    losses = falling(until, 3)
    for end in range(after + 20, until + 1, 20):
        steps = [StepLoss(step, float(losses[step - 1]), step % 7 != 0) for step in range(end - 19, end + 1)]
        for step in steps:
            more = ({} if step.applied else {"optim/skipped": 1}) | ({"time/step_ms": 1.0} if step.step == end else {})
            journal.metrics(step.step, {"loss/train": step.loss} | more)
        spikes.judge(steps)
    return spikes.limit


def test_the_measure_of_spikes_is_the_same_after_a_restart(tmp_path: Path) -> None:
    path, whole, elsewhere = tmp_path / "metrics.jsonl", Spikes(6.0, WINDOW), Journal(tmp_path / "whole", 1)
    limits = {step: logged(elsewhere, whole, step - 20, step) for step in range(20, 321, 20)}

    def past(step: int) -> Spikes:
        return read_past(read(path), step, HealthConfig(spike_window=WINDOW)).spikes

    for attempt, (begin, end) in enumerate([(0, 200), (140, 240), (160, 180), (60, 300)], 1):
        journal, live = Journal(path, attempt), past(begin) if begin else Spikes(6.0, WINDOW)
        assert live.limit == limits.get(begin, math.inf), "of steps that are computed again, nothing is known"
        journal.event("start", resumed_from=begin or None)
        assert logged(journal, live, begin, end) == limits[end]
    journal.event("rollback", step=300, text="", resumed_from=260, data={})
    live.rewind(260)
    assert past(260).limit == live.limit == limits[300]
    logged(journal, live, 260, 320)
    again = past(320)
    assert again.limit == live.limit == limits[320]
    assert list(again._losses) == list(live._losses)


def slow(rank: int, ratio: float = 1.5) -> Slowest:
    return Slowest(rank, f"n{rank}", ratio)


def test_a_straggler_is_named_once_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trends, "SLOW_SECONDS", 0.0)
    straggler = Straggler()
    told = [straggler.after(who) for who in (slow(1), slow(1), slow(2), slow(2), None, slow(2), slow(2), slow(2, 2.0))]
    assert told[:-1] == [None] * 7
    assert "rank 2 on n2" in (told[-1] or "")
    assert "2.00 times the mean" in (told[-1] or "")
    assert straggler.after(slow(2)) is None
    monkeypatch.setattr(trends, "SLOW_SECONDS", 1e9)
    straggler = Straggler()
    assert [straggler.after(slow(1)) for _ in range(50)] == [None] * 50


def test_gates_that_close_are_told_once_until_they_open_again() -> None:
    closed = Closed()
    assert closed.after({"dec_ff/00": 0.2, "dec_ff/01": 0.01}) is None
    assert "gates of dec_ff/01 have closed" in (closed.after({"dec_ff/00": 0.2, "dec_ff/01": 0.0}) or "")
    assert closed.after({"dec_ff/00": 0.2, "dec_ff/01": 0.0005}) is None
    assert "gates of dec_ff/00 have" in (closed.after({"dec_ff/00": 0.0, "dec_ff/01": 0.0}) or "")
    assert closed.after({"dec_ff/00": 0.1, "dec_ff/01": 0.1}) is None
    assert "dec_ff/00, dec_ff/01" in (closed.after({"dec_ff/00": 0.0, "dec_ff/01": 0.0}) or "")


def test_growth_is_told_once_and_a_jump_or_noise_is_none() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 200)

    def told(values: np.ndarray) -> list[int]:
        growth = Growth("memory")
        return [window for window, value in enumerate(values) if growth.after(float(value))]

    windows = np.arange(200)
    assert told(2 + noise) == []
    assert told(np.where(windows < 50, 2.0, 4.0) + noise) == []
    assert told(2 + 0.0001 * windows) == [], "too little to matter"
    [at] = told(2 + 0.05 * windows)
    assert 10 <= at <= 20
    assert len(told(2 + 0.05 * windows + noise / 10)) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["health.hang_minutes=10"], "must be below engine.timeout_minutes=10, which ends the run; for example 5"),
        (
            ["engine.timeout_minutes=2", "health.hang_minutes=5"],
            "health.hang_minutes=5 must be below engine.timeout_minutes=2",
        ),
        (
            ["health.on_spike=rollback", "health.rollback_checkpoints=4"],
            "health.rollback_checkpoints=4, but only train.keep_checkpoints=3 stay on disk",
        ),
        (["health.on_spike=explode"], "health.on_spike"),
        (["health.spike_window=2"], "health.spike_window"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message.replace(".", r"\.")):
        load(override)


def test_a_record_of_health_is_a_warning_of_the_report(tmp_path: Path) -> None:
    from pretrain.run.run_summary import load as load_run

    write_run(tmp_path / "metrics.jsonl")
    run = load_run(tmp_path)
    assert [(w.kind, w.fields["text"]) for w in run.warnings] == [("spike", "a spike"), ("rollback", "back")]
    assert isinstance(run.warnings[0], Record)
    sources = "".join(file.read_text() for file in SOURCE.glob("pretrain/**/*.py"))
    written = set(re.findall(r'\.health\("(\w+)"', sources))
    assert written - {"rollback"} == set(HEALTH), "what a run notices about itself is in its report"
