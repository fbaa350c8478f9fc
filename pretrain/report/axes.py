"""Of the axes of a picture: their colour, and where that of values begins and ends."""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 20
"""Of fewer values each counts."""

INK = "#768390"
"""Readable on white and on black: the page follows the reader's theme, its pictures are drawn once."""


def show_the_curve(axes: "Axes") -> None:
    """A few values that are far off, such as the first losses, must not press all others flat."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if line.get_marker() != "x"]
    values = np.concatenate([line[np.isfinite(line)] for line in lines if len(line) > 2] or [np.empty(0)])
    if len(values) < FEW:
        return
    low, high = np.percentile(values, (3, 97))
    if values.max() - high > 2 * (high - low) > 0:
        axes.set_ylim(top=high + (high - low) / 4)
    if low - values.min() > 2 * (high - low) > 0:
        axes.set_ylim(bottom=low - (high - low) / 4)


def begin_at_zero(axes: "Axes") -> None:
    """And end a little above the greatest value."""
    top = float(axes.dataLim.y1)
    axes.set_ylim(0.0, 1.08 * top if 0.0 < top < math.inf else None)
