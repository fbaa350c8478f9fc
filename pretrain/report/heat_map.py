"""Numbers of many places over the steps, as colours."""

import math
from typing import TYPE_CHECKING

from pretrain.report.axes import INK
from pretrain.run.journal import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAT_COLUMNS = 300


def heat_map(
    axes: "Axes", points: dict[str, list[Point]], prefix: str, highest: float | None, lowest: float = 0.0
) -> None:
    """A heat map: one row a site and layer, one column a step; the scale goes from `lowest` to `highest`."""
    import numpy as np

    names = sorted(name for name in points if name.startswith(prefix))
    steps = sorted({p.step for name in names for p in points[name]})
    steps = steps[:: max(1, math.ceil(len(steps) / HEAT_COLUMNS))]
    column = {step: index for index, step in enumerate(steps)}
    table = np.full((len(names), len(steps)), np.nan)
    for row, name in enumerate(names):
        for point in points[name]:
            if point.step in column:
                table[row, column[point.step]] = point.value
    axes.grid(False)
    mesh = axes.pcolormesh(
        steps, range(len(names)), table, shading="nearest", cmap="viridis", vmin=lowest, vmax=highest, rasterized=True
    )
    stride = math.ceil(len(names) / 24)
    labels = [name.removeprefix(prefix).replace("/", " ") for name in names[::stride]]
    axes.set_yticks(range(0, len(names), stride), labels)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(4.0, min(8.0, 150 / len(names))))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=7)
    bar.outline.set_visible(False)
