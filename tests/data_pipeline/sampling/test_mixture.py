from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.sampling.mixture import MAX_PERIOD, Mixture, integer_weights


def deviation(weights: list[int], slots: int) -> float:
    """Greatest |count - n·q/P| over all prefixes of `slots` slots and all sources."""
    mixture, prefixes = Mixture(weights), np.arange(1, slots + 1)
    sources, _ = mixture.at(np.arange(slots))
    return max(
        float(np.abs(np.cumsum(sources == k) - prefixes * weight / mixture.period).max())
        for k, weight in enumerate(weights)
    )


@settings(max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=64))
def test_no_prefix_is_off_by_a_whole_sample(weights: list[int]) -> None:
    sources, period = len(weights), sum(weights)
    bound = 1 - 1 / (2 * sources - 2) if sources > 1 else 0.0
    assert deviation(weights, 2 * period + period // 3) <= bound + 1e-9 < 1


@pytest.mark.parametrize("weights", [[1, MAX_PERIOD - 1], [1] * 63 + [MAX_PERIOD - 63], list(range(1, 65))])
def test_extreme_weights_hold_the_bound_too(weights: list[int]) -> None:
    assert deviation(weights, sum(weights) + 1000) < 1


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 10**12))
def test_slots_ranks_and_counts_agree_at_any_place(weights: list[int], start: int) -> None:
    mixture = Mixture(weights)
    slots = np.arange(start, start + 300)
    sources, ranks = mixture.at(slots)
    for source in range(len(weights)):
        before, after = mixture.counts(start)[source], mixture.counts(start + 300)[source]
        assert ranks[sources == source].tolist() == list(range(before, after))
    for slot in (0, 150, 299):
        assert mixture.slot_of(int(sources[slot]), int(ranks[slot])) == start + slot


def test_weights_are_exact_where_they_can_be() -> None:
    assert integer_weights({"a": 0.1, "b": 0.7, "c": 0.2, "d": 0}) == {"a": 1, "b": 7, "c": 2}
    assert integer_weights({"a": 3e9, "b": 1e9}) == {"a": 3, "b": 1}
    assert integer_weights({"only": 0.3}) == {"only": 1}


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=64))
def test_other_weights_are_the_nearest_shares(weights: list[float]) -> None:
    integers = integer_weights({str(k): weight for k, weight in enumerate(weights)})
    period, total = sum(integers.values()), sum(map(Fraction, map(str, weights)))
    assert period <= MAX_PERIOD
    assert min(integers.values()) >= 1
    for k, weight in enumerate(weights):
        assert abs(integers[str(k)] - Fraction(str(weight)) / total * period) <= len(weights)


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": float("nan")}, {"a": 1.0, "b": float("inf")}])
def test_weights_that_are_none_are_named(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"data\.weights\.[ab]=(-1.0|nan|inf): expected a number"):
        integer_weights(weights)
    with pytest.raises(DataError, match="0 sources have a weight above 0"):
        integer_weights({"a": 0.0})
