"""Which source is read at which position: proportions that hold on every prefix, from a table of one period."""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from data_pipeline.errors import DataError

MAX_PERIOD = 2**16


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as the smallest integers in the same proportion, in the order given; sources of weight 0 are left out.

    Exact where their sum is at most MAX_PERIOD; else they are shares of MAX_PERIOD by largest remainder, at least 1
    each. A decimal fraction is taken as written: 0.1 is a tenth.

    Raises DataError for a weight that is negative or not finite, and when nothing or too much is left to mix.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"data.weights.{name}={weight}: expected a number that is not negative")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
    if not 1 <= len(exact) <= MAX_PERIOD:
        raise DataError(f"data.weights: {len(exact)} sources have a weight above 0; expected 1 to {MAX_PERIOD}")
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: weight // divisor for name, weight in whole.items()}
    return whole if sum(whole.values()) <= MAX_PERIOD else _largest_remainder(whole)


def _largest_remainder(whole: Mapping[str, int]) -> dict[str, int]:
    total = sum(whole.values())
    shares = {name: weight * MAX_PERIOD // total for name, weight in whole.items()}
    by_remainder = sorted(whole, key=lambda name: -(whole[name] * MAX_PERIOD % total))
    for name in by_remainder[: MAX_PERIOD - sum(shares.values())]:
        shares[name] += 1
    for name in [name for name, share in shares.items() if not share]:
        shares[max(shares, key=shares.__getitem__)] -= 1
        shares[name] = 1
    return shares


class Mixture:
    """K sources with integer weights q that sum to P: slot n belongs to one, and any n slots hold n·q/P of each ±1.

    One period of P slots is laid out by Tijdeman's rule (The chairman assignment problem, 1980): of the sources that
    have fallen behind by 1/(2K - 2), the one that must come first. Then |count - n·q/P| <= 1 - 1/(2K - 2) for all n.
    """

    def __init__(self, weights: list[int]) -> None:
        """`weights`: positive integers. O(P log K) time, 6 bytes a slot."""
        self.weights = np.array(weights, np.int64)
        self.period = int(self.weights.sum())
        self._source = _period(weights)
        self._rank = np.empty(self.period, np.int32)
        for source in range(len(weights)):
            slots = np.flatnonzero(self._source == source)
            self._rank[slots] = np.arange(len(slots))

    def at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and how many earlier slots it had: int64 [n] to int64 [n], int64 [n]."""
        periods, within = np.divmod(slots, self.period)
        source = self._source[within].astype(np.int64)
        return source, periods * self.weights[source] + self._rank[within]

    def counts(self, slots: int) -> np.ndarray:
        """How many of the first `slots` slots each source has, int64 [K]."""
        periods, within = divmod(slots, self.period)
        return periods * self.weights + np.bincount(self._source[:within], minlength=len(self.weights))

    def slot_of(self, source: int, rank: int) -> int:
        """The slot at which `source` comes for the `rank`-th time, counted from 0."""
        periods, within = divmod(rank, int(self.weights[source]))
        return periods * self.period + int(np.flatnonzero(self._source == source)[within])


def _period(weights: list[int]) -> np.ndarray:
    """The source of each slot of a period, uint16 [P].

    With slots counted from 1 and e = 1/(2K - 2), the j-th turn of a source may come from slot ceil((j + e)·P/q) on and
    must by slot floor((j + 1 - e)·P/q). Tijdeman proved that all can be met, so the earliest deadline first meets them.
    """
    period, parts = sum(weights), 2 * len(weights) - 2
    if not parts:
        return np.zeros(period, np.uint16)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period + 1)]
    for source, weight in enumerate(weights):
        turns = np.arange(weight, dtype=np.int64) * parts
        first = -(-(turns + 1) * period // (weight * parts))
        due = (turns + parts - 1) * period // (weight * parts)
        for slot, time in zip(first.tolist(), due.tolist(), strict=True):
            released[slot].append((time, source))
    slots = np.empty(period, np.uint16)
    waiting: list[tuple[int, int]] = []
    for slot in range(period):
        for turn in released[slot + 1]:
            heapq.heappush(waiting, turn)
        slots[slot] = heapq.heappop(waiting)[1]
    return slots
