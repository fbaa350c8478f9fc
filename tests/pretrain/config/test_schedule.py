"""The learning rate over the tokens, and how long a run is."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from pretrain.config.schedule import decay_start, learning_rate
from pretrain.config.schema import Config, dump, load

KINDS = ["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


def at(config: Config, step: int) -> float:
    return learning_rate(config, step * config.batch.tokens)


def make(kind: str, steps: int, warmup: int, cooldown: int = 0, tokens: int = 8192, **schedule: Any) -> Config:
    given = schedule | {"kind": kind, "warmup_steps": warmup, "cooldown": cooldown if kind == "wsd" else 0}
    tree = {"schedule": given, "train": {"steps": steps}, "optimizer": {"lr": 0.01}, "batch": {"tokens": tokens}}
    return Config.model_validate(tree)


def first_formula(config: Config, step: int) -> float:
    """As it was when there were `cosine` and `constant` only, in steps."""
    peak, schedule = config.optimizer.lr, config.schedule
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, config.train.steps - schedule.warmup_steps)
    return schedule.final_lr + 0.5 * (peak - schedule.final_lr) * (1 + math.cos(math.pi * progress))


@given(steps=st.integers(1, 10**6), warmup=st.integers(0, 10**4), share=st.floats(0, 1), tokens=st.integers(1, 10**4))
def test_cosine_and_constant_are_bit_for_bit_what_they_were(steps: int, warmup: int, share: float, tokens: int) -> None:
    for kind in ("cosine", "constant"):
        config = make(kind, steps, warmup, tokens=tokens * 256, final_lr=0.001)
        step = max(1, round(share * steps))
        assert at(config, step) == first_formula(config, step)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_each_kind_rises_to_the_peak_and_never_again(kind: str, data: st.DataObject) -> None:
    steps = data.draw(st.integers(2, 300))
    warmup = data.draw(st.integers(0, steps - 1))
    cooldown = data.draw(st.integers(0, steps - warmup))
    config = make(kind, steps, warmup, cooldown, final_lr=0.001)
    rates = [at(config, step) for step in range(1, steps + 1)]
    rounding = 1 + 1e-12
    assert max(rates) <= 0.01 * rounding
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a * rounding >= b for a, b in pairwise(rates[warmup:]))
    if warmup:
        assert rates[warmup - 1] == pytest.approx(0.01)
    if decay_start(config) is not None and warmup < steps:
        assert rates[-1] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("linear", {}, [0.005, 0.01, 0.00875, 0.0075, 0.00625, 0.005, 0.00375, 0.0025, 0.00125, 0.0]),
        ("wsd", {"cooldown_shape": "linear"}, [0.005, *[0.01] * 5, 0.0075, 0.005, 0.0025, 0.0]),
        ("wsd", {}, [0.005, *[0.01] * 5, 0.005, 0.01 * (1 - 0.5**0.5), 0.01 * (1 - 0.75**0.5), 0.0]),
        ("inverse_sqrt", {}, [0.005, 0.01, *(0.01 * (2 / step) ** 0.5 for step in range(3, 11))]),
    ],
)
def test_known_values(kind: str, more: dict[str, Any], expected: list[float]) -> None:
    config = make(kind, 10, 2, 4, **more)
    assert [at(config, step) for step in range(1, 11)] == pytest.approx(expected, abs=1e-12)


@given(cooldown=st.integers(1, 50), longer=st.integers(0, 50))
def test_a_wsd_run_without_end_is_any_wsd_run_before_its_cooldown(cooldown: int, longer: int) -> None:
    endless, cooled = make("wsd", 200, 10), make("wsd", 100 + longer, 10, cooldown)
    start = decay_start(cooled)
    assert start == 100 + longer - cooldown
    assert [at(endless, step) for step in range(1, start + 1)] == [at(cooled, step) for step in range(1, start + 1)]


def test_tokens_are_the_same_length_as_their_steps() -> None:
    by_tokens = load(["train.tokens=81920"])
    assert by_tokens == load(["train.steps=10"])
    assert by_tokens.train.tokens is None, "a run folder says it once"
    assert load(["run/quickstart", "train.steps=null", "train.tokens=20480"]).train.steps == 10
    assert "steps: 10\n" in dump(by_tokens)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train.steps=10", "train.tokens=81920"], "take one out, for example with train.steps=null"),
        (["train.tokens=82000"], "nearest: 81920 or 90112"),
        (["train.tokens=100"], "nearest: 8192"),
        (["schedule.cooldown=10"], "cooldown=10 is for kind=wsd; cosine has no cool-down of its own"),
        (
            ["schedule.kind=wsd", "schedule.cooldown=95", "schedule.warmup_steps=10", "train.steps=100"],
            "can be at most 90",
        ),
        (["schedule.kind=step"], "schedule.kind"),
    ],
)
def test_mistakes_name_the_way_on(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(args)
    assert message in str(caught.value)
