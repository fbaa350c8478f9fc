"""What a ladder tells, in words, tables and a picture. Free of torch."""

import math
from collections.abc import Iterator

import numpy as np

from pretrain.report.axes import INK
from pretrain.report.plots import COLOURS, png
from pretrain.study.ladder import FIT, Ladder, training_flops
from pretrain.study.power_law import EXPONENTS, Interval, Told, Trial, tell
from pretrain.study.results import Results, mean

FEWEST = 3
"""Sizes that a curve needs."""
PICTURE_POINTS = 100


def points_of(ladder: Ladder, results: Results) -> list[Trial]:
    """The finished runs of the sizes that every arm has."""
    whole = [size for size in ladder.sizes if all(results.of(size, arm) for arm in ladder.arms)]
    return [
        Trial(arm, training_flops(result.config), result.loss)
        for size in whole
        for arm in ladder.arms
        for result in results.of(size, arm)
    ]


def fit_of(ladder: Ladder, points: list[Trial]) -> tuple[list[str], dict[str, bytes]]:
    """The lines of the table, and the picture by name; words alone where too few sizes are whole."""
    whole = len({point.flops for point in points if point.arm == ladder.baseline})
    if whole < FEWEST:
        return [f"*{whole} sizes are whole; a curve needs {FEWEST}.*"], {}
    told = tell(points, ladder.baseline)
    return list(_lines(ladder, told)), {f"{FIT}-curves": _picture(points, told, ladder.unit)}


def _lines(ladder: Ladder, told: Told) -> Iterator[str]:
    yield (
        f"Loss = a + b (F / {told.fit.scale:.3g})^-c, F in training FLOPs that are computed; c is "
        f"{_interval(told.exponent, 3)} for all arms."
    )
    if told.exponent.value == EXPONENTS[0]:
        yield (
            "That is the smallest that is tried: losses fall evenly with the logarithm of F, and **these sizes show no "
            "floor**, so that a and b say nothing by themselves."
        )
    if math.isfinite(told.p):
        yield (
            f"Seeds of one cell differ by {told.noise:.4f} (standard deviation). Noise of that size makes exponents of "
            f"their own fit better by as much in {told.p:.0%} of all draws: "
            + ("nothing speaks against one exponent." if told.p >= 0.05 else "**one exponent does not fit all arms**.")
        )
    else:
        yield "Every cell has one seed, so nothing tells the noise, and there are no intervals."
    yield ""
    yield "| arm | a | b | own c | above the baseline, smallest | largest | growth of the gap | which means |"
    yield "|---" * 8 + "|"
    for arm in ladder.arms:
        a, b, c = told.fit.a[arm], told.fit.b[arm], told.own[arm]
        if arm == ladder.baseline:
            yield f"| {arm} | {a:.4f} | {b:.4f} | {c:.3f} | – | – | – | the baseline |"
            continue
        low, high, growth = told.gaps[arm]
        gaps = " | ".join(_interval(value, 4, sign=True) for value in (low, high, growth))
        yield f"| {arm} | {a:.4f} | {b:.4f} | {c:.3f} | {gaps} | {_meaning(growth)} |"


def _meaning(growth: Interval) -> str:
    if not math.isfinite(growth.low):
        return "no interval"
    if growth.low > 0:
        return "the gap grows"
    if growth.high < 0:
        return "the gap closes"
    return "these runs cannot tell"


def _interval(value: Interval, digits: int, *, sign: bool = False) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    if not math.isfinite(value.low):
        return f"{value.value:{form}}"
    return f"{value.value:{form}} ({value.low:{form}} to {value.high:{form}})"


def _picture(points: list[Trial], told: Told, unit: str) -> bytes:
    """Means of the seeds and the curves through them, compute on a log axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(told.fit.c):
        colour, mine = COLOURS[index % len(COLOURS)], [point for point in points if point.arm == arm]
        budgets = sorted({point.flops for point in mine})
        means = [mean(point.loss for point in mine if point.flops == budget) for budget in budgets]
        curve = np.geomspace(budgets[0], budgets[-1], PICTURE_POINTS)
        axes.plot(budgets, means, "o", color=colour, markersize=4)
        axes.plot(curve, [told.fit.loss(arm, flops) for flops in curve], color=colour, linewidth=1.3, label=arm)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs", fontsize=8)
    axes.set_ylabel(unit)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)
    return png(figure, dpi=100)
