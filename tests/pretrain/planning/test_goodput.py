"""What interruptions cost: the formula against runs drawn one by one, its limits, and the best interval."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from model.gpus import GPUS
from pretrain.config.schema import load
from pretrain.planning.costs import changed, costs
from pretrain.planning.goodput import GPU_HOURS, Times, best_interval, expected, outlook, parse_times

SECONDS = st.floats(0.0, 1000.0)
MEANS = st.floats(600.0, 1e7)


@given(MEANS, st.floats(1.0, 1e5), st.builds(Times, *[SECONDS] * 6))
def test_the_shares_are_all_of_the_time(mean: float, interval: float, times: Times) -> None:
    found = expected(mean, interval, times)
    parts = (found.share, found.saving, found.lost, found.down)
    assert sum(parts) == pytest.approx(1.0)
    assert all(part >= -1e-12 for part in parts)
    assert all(gain >= -1e-12 for gain in found.by_second.values())


@given(MEANS, st.floats(0.01, 500.0), SECONDS)
def test_no_interval_is_better_than_the_best(mean: float, save: float, store: float) -> None:
    times = Times(save, store, 30.0)
    best = best_interval(mean, save)
    most = expected(mean, best, times).share
    assert all(expected(mean, best * factor, times).share <= most * (1 + 1e-9) for factor in (0.5, 0.98, 1.02, 2.0))
    if save < mean / 100:
        assert best == pytest.approx(math.sqrt(2 * save * mean), rel=0.1), "Young's"


def test_runs_that_are_drawn_come_to_what_is_expected() -> None:
    mean, interval, times = 5000.0, 400.0, Times(20.0, 90.0, 60.0, detect=100.0)
    draw = random.Random(3)
    wall = useful = 0.0
    for _ in range(20_000):
        alive = draw.expovariate(1 / mean)
        saves = max(0, math.floor((alive - times.store) / (interval + times.save)))
        while (down := draw.expovariate(1 / mean)) < times.down:
            wall += down
        wall, useful = wall + alive + times.down, useful + saves * interval
    assert useful / wall == pytest.approx(expected(mean, interval, times).share, rel=0.01)


def test_a_run_that_is_interrupted_before_it_ever_saves_trains_nothing() -> None:
    found = expected(60.0, 60_000.0, Times(1.0, 0.0, 0.0))
    assert found.share == 0 and found.lost + found.down == pytest.approx(1.0)
    assert expected(3.6, 10.0, Times(1.0, 1.0, 9999.0)).down == 1.0, "it never comes back"


def test_an_outlook_takes_what_is_given_and_the_published_rate_else() -> None:
    config = load(["model/parallel-1b3", "model.vocab_size=50304", "batch.tokens=1572864", "train.steps=500"])
    found = costs(config, 64, GPUS["h100"], 0.4)
    ahead = outlook(config, found, 64, None, {"load": 33.0})
    assert ahead.hours * 64 == GPU_HOURS
    assert ahead.times.load == 33.0 and ahead.times.save == pytest.approx(found.checkpoint_bytes / 64 / 5e9)
    assert ahead.own.interval == config.train.checkpoint_every * found.step_seconds
    assert ahead.best.share >= ahead.own.share
    assert ahead.best_steps == config.train.steps, "a longer interval than the run there is none"
    config = changed(config, {"train.checkpoint_every": 10**6})
    assert outlook(config, found, 64, None, {"load": 33.0}).own == ahead.best
    assert outlook(config, found, 64, 3.0, {"save": 0.0}).best_steps == 1
    assert parse_times(["load=33", "save=0"]) == {"load": 33.0, "save": 0.0}
    for wrong in ("load", "load=-1", "load=nan", "sleep=3", "load=soon", "load=inf"):
        with pytest.raises(ConfigError, match="expected NAME=SECONDS"):
            parse_times([wrong])
