"""The pictures of a report: one function a panel, drawn by matplotlib without a display or global state."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.journal import Point
from pretrain.report_data import BITS_PER_BYTE, LOSS, VALIDATION, RunData, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308", "#ec4899")
INK = "#768390"
"""Readable on white and on black: the page follows the reader's theme, its pictures are drawn once."""
SITE_PREFIX = "gate/density/"
HEAT_COLUMNS = 300
SMOOTH_FROM = 60
"""Points from which a running mean is drawn over the raw line."""


@dataclass(frozen=True)
class Panel:
    """One plot. `draw` gets only runs that have one of `metrics`; `single`: for a report of one run only."""

    title: str
    metrics: tuple[str, ...]
    draw: Callable[["Axes", list[RunData]], None]
    single: bool = False


def panels(runs: list[RunData]) -> list[Panel]:
    """The panels there is something to show in."""
    return [panel for panel in PANELS if any(_has(run, panel) for run in runs) and not (panel.single and len(runs) > 1)]


def panel_png(panel: Panel, runs: list[RunData]) -> bytes:
    """One panel with a transparent background, for the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.6) if panel.single else (6.4, 3.5), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    _draw(axes, panel, runs, title=False)
    return _png(figure, dpi=160)


def overview_png(runs: list[RunData]) -> bytes:
    """All panels on white with the verdict above them, for a README."""
    from matplotlib.figure import Figure

    shown = panels(runs)
    columns = min(3, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5.0 * columns, 3.3 * max(rows, 1) + 1.0), facecolor="white", layout="constrained")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    words = "\n".join(verdict(runs[0])) if len(runs) == 1 else ", ".join(run.name for run in runs)
    figure.suptitle(_plain(f"{title}\n{words}"), x=0.01, ha="left", fontsize=11, color="#1f2328")
    grid = figure.add_gridspec(max(rows, 1), columns)
    for index, panel in enumerate(shown):
        row, column = divmod(index, columns)
        place = grid[row, column:] if panel is shown[-1] else grid[row, column]
        _draw(figure.add_subplot(place), panel, runs, title=True)
    return _png(figure, dpi=110)


def _draw(axes: "Axes", panel: Panel, runs: list[RunData], *, title: bool) -> None:
    if title:
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color="#1f2328")
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    panel.draw(axes, [run for run in runs if _has(run, panel)])
    axes.set_xlabel("step", color=INK, fontsize=8)
    axes.yaxis.label.set_color(INK)
    axes.yaxis.label.set_fontsize(8)
    if not panel.single:
        axes.margins(x=0.01)
        if len(runs) == 1:
            _mark_restarts(axes, runs[0], "resumed" if LOSS in panel.metrics else None)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, labelcolor=INK, frameon=False)


def _draw_loss(axes: "Axes", runs: list[RunData]) -> None:
    for run, colour in zip(runs, _colours(runs), strict=True):
        several = len(runs) > 1
        _line(axes, run.points.get(LOSS, []), colour, _plain(run.name) if several else "training", smooth=True)
        validation = run.points.get(VALIDATION, [])
        if validation:
            steps, values = [p.step for p in validation], [p.value for p in validation]
            accent = colour if several else COLOURS[1]
            label = None if several else "validation"
            axes.plot(steps, values, "o--" if several else "o-", color=accent, markersize=4, linewidth=1.2, label=label)
    axes.set_ylabel("nats per token" + (" (dashed: validation)" if len(runs) > 1 else ""))


def _draw_bits(axes: "Axes", runs: list[RunData]) -> None:
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = run.points[BITS_PER_BYTE]
        steps, values = [p.step for p in points], [p.value for p in points]
        axes.plot(steps, values, "o-", color=colour, markersize=4, label=_plain(run.name) if len(runs) > 1 else None)
    for order0 in sorted({run.order0_entropy for run in runs if run.order0_entropy is not None}):
        axes.axhline(order0, color=INK, linestyle=":", label=f"byte frequencies alone: {order0:.3f}")
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("bits per byte")


def _metric(
    name: str, unit: str, *, smooth: bool = False, from_zero: bool = False
) -> Callable[["Axes", list[RunData]], None]:
    def draw(axes: "Axes", runs: list[RunData]) -> None:
        for run, colour in zip(runs, _colours(runs), strict=True):
            _line(axes, run.points[name], colour, _plain(run.name) if len(runs) > 1 else None, smooth=smooth)
        axes.set_ylabel(unit)
        if from_zero:
            axes.set_ylim(bottom=0.0)

    return draw


def _draw_sites(axes: "Axes", runs: list[RunData]) -> None:
    """One row a site and layer, one column a step."""
    import numpy as np

    points = runs[0].points
    names = sorted(name for name in points if name.startswith(SITE_PREFIX))
    steps = sorted({p.step for name in names for p in points[name]})
    steps = steps[:: max(1, math.ceil(len(steps) / HEAT_COLUMNS))]
    column = {step: index for index, step in enumerate(steps)}
    table = np.full((len(names), len(steps)), np.nan)
    for row, name in enumerate(names):
        for point in points[name]:
            if point.step in column:
                table[row, column[point.step]] = point.value
    axes.grid(False)
    mesh = axes.pcolormesh(steps, range(len(names)), table, shading="nearest", cmap="viridis", vmin=0.0, vmax=1.0)
    stride = math.ceil(len(names) / 24)
    axes.set_yticks(
        range(0, len(names), stride), [name.removeprefix(SITE_PREFIX).replace("/", " ") for name in names[::stride]]
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(4.0, min(8.0, 150 / len(names))))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=7)
    bar.outline.set_visible(False)


PANELS = (
    Panel("Loss", (LOSS, VALIDATION), _draw_loss),
    Panel("Validation, bits per byte", (BITS_PER_BYTE,), _draw_bits),
    Panel("Learning rate", ("optim/lr",), _metric("optim/lr", "learning rate")),
    Panel("Gradient norm", ("optim/grad_norm",), _metric("optim/grad_norm", "norm before clipping", smooth=True)),
    Panel(
        "Speed",
        ("time/tokens_per_second",),
        _metric("time/tokens_per_second", "tokens per second", smooth=True, from_zero=True),
    ),
    Panel("Gate density", ("gate/density",), _metric("gate/density", "share of open gates")),
    Panel("Gate density by site and layer", (SITE_PREFIX,), _draw_sites, single=True),
)


def _has(run: RunData, panel: Panel) -> bool:
    if panel.metrics == (SITE_PREFIX,):
        return any(name.startswith(SITE_PREFIX) for name in run.points)
    return any(name in run.points for name in panel.metrics)


def _line(axes: "Axes", points: list[Point], colour: str, label: str | None, *, smooth: bool) -> None:
    """A curve; what is not finite is a red cross on the axis."""
    import numpy as np

    steps, values = np.array([p.step for p in points]), np.array([p.value for p in points])
    finite = np.isfinite(values)
    if not finite.all():
        axes.plot(steps[~finite], np.zeros((~finite).sum()), "x", color="#ef4444", transform=axes.get_xaxis_transform())
    if not smooth or finite.sum() < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.4, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    steps, values = steps[finite], values[finite]
    width = max(5, len(values) // 50)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    axes.plot(steps, (sums[high] - sums[low]) / (high - low), color=colour, linewidth=1.6, label=label)


def _mark_restarts(axes: "Axes", run: RunData, label: str | None) -> None:
    resumed = (start.fields.get("resumed_from") for start in run.starts)
    for step in sorted({step for step in resumed if step is not None}):
        axes.axvline(step, color=INK, linestyle="--", linewidth=0.9, alpha=0.8, label=label)
        label = None


def _colours(runs: list[RunData]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula, nor a leading underscore as 'no legend'."""
    return text.replace("$", r"\$").lstrip("_") or "run"


def _png(figure: "Figure", dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
