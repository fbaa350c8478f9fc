"""Losses as powers of compute, loss = a + b (F / F0)^-c, with intervals. Free of torch.

The form is that of Hoffmann et al. 2022 (arXiv:2203.15556, equation 2) in FLOPs alone; a and b belong to an arm, and c
to all arms unless each has its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EXPONENTS = np.geomspace(0.01, 2.0, 400)
"""Those that are tried; neighbours differ by 1.3 %."""
DRAWS = 1000
COVERAGE = (2.5, 97.5)
"""Percentiles of an interval of 95 %."""


class Trial(NamedTuple):
    """A finished run."""

    arm: str
    flops: float
    loss: float


class Interval(NamedTuple):
    """A value, and the range that 95 % of the draws fall into; NaN where no seeds tell the noise."""

    value: float
    low: float
    high: float


class Fit(NamedTuple):
    """The curves of all arms."""

    scale: float
    """F0, the geometric mean of the budgets."""
    a: dict[str, float]
    b: dict[str, float]
    c: dict[str, float]
    squares: float
    """The sum of what is left, squared."""

    def loss(self, arm: str, flops: float) -> float:
        """What an arm's curve says."""
        return float(self.a[arm] + self.b[arm] * (flops / self.scale) ** -self.c[arm])


class Told(NamedTuple):
    """What a ladder tells."""

    fit: Fit
    """With one exponent for all."""
    exponent: Interval
    own: dict[str, float]
    """The exponents where each arm has one of its own."""
    p: float
    """How often noise alone makes own exponents fit better by as much; NaN without seeds."""
    noise: float
    """Standard deviation between the seeds of a cell; NaN without."""
    gaps: dict[str, tuple[Interval, Interval, Interval]]
    """By arm: loss above the baseline's at the smallest budget and at the largest, and what its size grew by."""


def fit(points: Sequence[Trial], *, shared: bool) -> Fit:
    """Least squares: for a given c both a and b are linear, so only c is searched.

    Raises:
        ValueError: an arm has fewer than three budgets.
    """
    arms = list(dict.fromkeys(point.arm for point in points))
    scale = float(np.exp(np.mean([np.log(point.flops) for point in points])))
    found = {}
    for arm in arms:
        flops = np.array([point.flops for point in points if point.arm == arm]) / scale
        if len(set(flops)) < 3:
            raise ValueError(f"{arm} has {len(set(flops))} budgets; a curve of three numbers needs three")
        found[arm] = _by_exponent(flops, np.array([point.loss for point in points if point.arm == arm]))
    squares = {arm: left for arm, (_, _, left) in found.items()}
    best = int(np.argmin(sum(squares.values())))
    chosen = {arm: best if shared else int(np.argmin(squares[arm])) for arm in arms}
    return Fit(
        scale,
        {arm: float(found[arm][0][chosen[arm]]) for arm in arms},
        {arm: float(found[arm][1][chosen[arm]]) for arm in arms},
        {arm: float(EXPONENTS[chosen[arm]]) for arm in arms},
        float(sum(squares[arm][chosen[arm]] for arm in arms)),
    )


def _by_exponent(flops: Floats, losses: Floats) -> tuple[Floats, Floats, Floats]:
    """For each of EXPONENTS: a, b and the sum of squares that is left."""
    x = flops[None] ** -EXPONENTS[:, None]
    centred, rest = x - x.mean(1, keepdims=True), losses - losses.mean()
    b = (centred * rest).sum(1) / (centred**2).sum(1)
    left = ((rest - b[:, None] * centred) ** 2).sum(1)
    return losses.mean() - b * x.mean(1), b, left


def tell(points: Sequence[Trial], baseline: str, seed: int = 0) -> Told:
    """Fit all arms, and draw anew what the seeds say is noise to learn what that decides.

    Args:
        points: one a run; seeds of an arm at one budget are a cell.
        baseline: the arm with which the others are compared.
        seed: of the draws.

    Raises:
        ValueError: an arm has fewer than three budgets.
    """
    one, each = fit(points, shared=True), fit(points, shared=False)
    noise = _noise(points)
    gaps = list(_gaps(one, points, baseline))
    draws, better = [], []
    random = np.random.default_rng(seed)
    for _ in range(DRAWS if np.isfinite(noise) else 0):
        drawn = fit(_drawn(points, _means(points), noise, random), shared=True)
        draws.append([drawn.c[baseline], *(value for _, three in _gaps(drawn, points, baseline) for value in three)])
        alike = {(point.arm, point.flops): one.loss(point.arm, point.flops) for point in points}
        null = _drawn(points, alike, noise, random)
        better.append(fit(null, shared=True).squares - fit(null, shared=False).squares)
    values = [one.c[baseline], *(value for _, three in gaps for value in three)]
    ends = np.percentile(draws, COVERAGE, axis=0) if draws else np.full((2, len(values)), np.nan)
    all_of = [Interval(value, float(low), float(high)) for value, low, high in zip(values, *ends, strict=True)]
    return Told(
        one,
        all_of[0],
        each.c,
        float(np.mean(np.array(better) >= one.squares - each.squares)) if better else float("nan"),
        noise,
        {arm: (all_of[3 * i + 1], all_of[3 * i + 2], all_of[3 * i + 3]) for i, (arm, _) in enumerate(gaps)},
    )


def _gaps(fitted: Fit, points: Sequence[Trial], baseline: str) -> Iterator[tuple[str, tuple[float, float, float]]]:
    ends = [end(point.flops for point in points if point.arm == baseline) for end in (min, max)]
    for arm in fitted.c:
        if arm != baseline:
            low, high = (fitted.loss(arm, flops) - fitted.loss(baseline, flops) for flops in ends)
            yield arm, (low, high, abs(high) - abs(low))


def _cells(points: Sequence[Trial]) -> dict[tuple[str, float], list[float]]:
    cells: dict[tuple[str, float], list[float]] = {}
    for point in points:
        cells.setdefault((point.arm, point.flops), []).append(point.loss)
    return cells


def _means(points: Sequence[Trial]) -> dict[tuple[str, float], float]:
    return {cell: float(np.mean(losses)) for cell, losses in _cells(points).items()}


def _noise(points: Sequence[Trial]) -> float:
    """Pooled over the cells."""
    cells = _cells(points).values()
    freedom = sum(len(losses) - 1 for losses in cells)
    if not freedom:
        return float("nan")
    return float(np.sqrt(sum(len(losses) * np.var(losses) for losses in cells) / freedom))


def _drawn(
    points: Sequence[Trial], around: Mapping[tuple[str, float], float], noise: float, random: np.random.Generator
) -> list[Trial]:
    return [
        Trial(point.arm, point.flops, around[point.arm, point.flops] + noise * random.standard_normal())
        for point in points
    ]
