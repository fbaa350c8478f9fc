"""What shows only from window to window of logging: a slow rank, growing memory, gates that have closed."""

import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise

from pretrain.tracking.metrics import Slowest

SLOW_WINDOWS = 3
SLOW_SECONDS = 30.0
"""A rank must stay the slowest for so long and so many windows; one slow window is no news to the user."""
WARM_UP_WINDOWS = 5
RISES = 8
"""Of the last RISES_OF changes from window to window that must be upward: a single jump is not growth."""
RISES_OF = 10
GROWTH = 1.25
LEAST_GROWTH_GIB = 0.1
CLOSED = 1e-3
"""Density of gates below which hardly a token opens any."""


class Straggler:
    """Names a rank that holds up the others window after window, once."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._windows = 0
        self._since = 0.0
        self._told = False

    def after(self, slowest: Slowest | None) -> str | None:
        """A window is over, in which this rank was much slower than the mean; what to tell the user, if anything."""
        if slowest is None or slowest.rank != self._rank:
            self._rank = slowest.rank if slowest else None
            self._windows, self._since, self._told = 0, time.monotonic(), False
        self._windows += 1
        lasts = self._windows >= SLOW_WINDOWS and time.monotonic() - self._since >= SLOW_SECONDS
        if slowest is None or self._told or not lasts:
            return None
        self._told = True
        return (
            f"rank {slowest.rank} on {slowest.host} holds up the others: its own work has taken the longest for "
            f"{self._windows} windows of train.log_every steps, now {slowest.ratio:.2f} times the mean"
        )


class Growth:
    """Notices memory that keeps growing beyond its level after the warm-up, once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._level = 0.0
        self._windows = 0
        self._values: deque[float] = deque(maxlen=RISES_OF + 1)
        self._told = False

    def after(self, gib: float) -> str | None:
        """A window is over; what to tell the user, if anything."""
        self._windows += 1
        if self._windows <= WARM_UP_WINDOWS:
            self._level = max(self._level, gib)
        self._values.append(gib)
        values = list(self._values)
        rises = sum(after > before for before, after in pairwise(values))
        beyond = gib > max(GROWTH * self._level, self._level + LEAST_GROWTH_GIB)
        if self._told or rises < RISES or not beyond:
            return None
        self._told = True
        return (
            f"{self._what} keeps growing: {self._level:.2f} GiB after the warm-up, {values[0]:.2f} GiB "
            f"{len(values) - 1} windows ago, {gib:.2f} GiB now (the largest of all ranks)"
        )


class Closed:
    """Names feed forwards whose gates have all closed, each once until it opens again."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def after(self, densities: Mapping[str, float]) -> str | None:
        """A window is over with these densities, by site and layer; what to tell the user, if anything."""
        now = {name for name, density in densities.items() if density < CLOSED}
        new, self._told = sorted(now - self._told), now
        if not new:
            return None
        return (
            f"the gates of {', '.join(new)} have closed: fewer than {CLOSED:.1%} of the blocks were open, so that the "
            "feed forward adds nothing; a lower model.block_gates.dual_rate or a later train_sparse_after leaves them "
            "time, and duet checkpoint shrink removes what stays closed"
        )
