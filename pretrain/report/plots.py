"""The pictures of a report: one function a panel, drawn by matplotlib without a display or global state."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pretrain.metric_names import (
    ALPHA,
    BACKWARD_MS,
    BITS_PER_BYTE,
    CHECKPOINT_MS,
    DATA_MS,
    DENSITY,
    DRAFT_LOSS,
    DROPPED,
    EARLIER_LOSS,
    EMPTY,
    FORWARD_MS,
    FULLEST,
    GATE_ENTROPY,
    GOODPUT,
    GRAD_NORM,
    LABEL_SCORES,
    LEARNING_RATE,
    LOSS,
    MEMORY,
    MFU,
    MULTIPLIER,
    OPTIMIZER_MS,
    PEAK_MEMORY,
    PONDER_SHARE,
    PONDER_STEPS,
    RANK_SPREAD,
    REFINE_CHANGE,
    SPAN,
    STEP_MS,
    TOKENS_PER_SECOND,
    TOKENS_SEEN,
    UPDATE_RATIO,
    VALIDATION,
    VALIDATION_IN_ORDER,
    ZEROS,
    Metric,
)
from pretrain.report.axes import INK, begin_at_zero, show_the_curve
from pretrain.report.heat_map import heat_map
from pretrain.run.journal import Point
from pretrain.run.run_summary import OF_SOURCES, RunData, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308", "#ec4899")
TIME_PARTS = {
    "data": DATA_MS,
    "forward": FORWARD_MS,
    "backward": BACKWARD_MS,
    "optimizer": OPTIMIZER_MS,
    "checkpoint": CHECKPOINT_MS,
}
NARROW, WIDE = (5.2, 3.0), (10.5, 3.2)
"""Width and height of a panel, in inches."""
HEAD, TITLE = 0.9, 0.3
"""Heights, in the overview, of what stands above all panels and above each, in inches."""
DPI, OVERVIEW_DPI = 180, 100
SOURCES_INSIDE = 6
"""Of more than these the legend is beside the plot."""
SMOOTH_FROM = 60
"""Points from which a running mean is drawn over the raw line."""


Coloured = list[tuple[RunData, str]]
"""Runs, each in the colour it has in every panel."""


@dataclass(frozen=True)
class Panel:
    """One plot. `draw` gets only runs that have one of `metrics`; a name that ends in a slash stands for all below it.

    `single`: for a report of one run only. `wide`: as wide as the page. `by_tokens`: against tokens, not steps.
    `still`: a picture without curves. `smooth`: with a running mean. `from_zero`: the axis begins at 0.
    """

    title: str
    metrics: tuple[str, ...]
    draw: Callable[["Axes", Coloured], None]
    single: bool = False
    wide: bool = False
    by_tokens: bool = False
    still: bool = False
    smooth: bool = False
    from_zero: bool = False


def panels(runs: list[RunData]) -> list[Panel]:
    """The panels there is something to show in."""
    return [panel for panel in PANELS if any(_has(run, panel) for run in runs) and not (panel.single and len(runs) > 1)]


def panel_png(panel: Panel, runs: list[RunData]) -> bytes:
    """One panel with a transparent background, for the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=WIDE if panel.wide else NARROW, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    _draw(axes, panel, runs)
    return png(figure, DPI)


def overview_png(runs: list[RunData], drawn: Sequence[tuple[Panel, bytes]]) -> bytes:
    """The panels on white with the verdict above them, for a README. Made of their PNGs: to draw takes longest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    narrow, wide = [one for one in drawn if not one[0].wide], [one for one in drawn if one[0].wide]
    columns = min(3, max(1, len(narrow)))
    rows = math.ceil(len(narrow) / columns)
    width = max(NARROW[0] * columns, WIDE[0] if wide else 0.0)
    height = HEAD + rows * (TITLE + NARROW[1]) + len(wide) * (TITLE + WIDE[1])
    figure = Figure(figsize=(width, height), dpi=OVERVIEW_DPI, facecolor="white")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    words = "\n".join(verdict(runs[0])) if len(runs) == 1 else ", ".join(run.name for run in runs)
    _write(figure, 0.1, 0.1, f"{title}\n{words}", fontsize=11)
    tops = [HEAD + index // columns * (TITLE + NARROW[1]) for index in range(len(narrow))]
    tops += [HEAD + rows * (TITLE + NARROW[1]) + index * (TITLE + WIDE[1]) for index in range(len(wide))]
    lefts = [index % columns * NARROW[0] for index in range(len(narrow))] + [0.0] * len(wide)
    for (panel, _), left, top in zip(narrow + wide, lefts, tops, strict=True):
        _write(figure, left + 0.3, top, panel.title, fontsize=10, fontweight="bold")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    for (panel, content), left, top in zip(narrow + wide, lefts, tops, strict=True):
        across, down = (round(OVERVIEW_DPI * inches) for inches in (WIDE if panel.wide else NARROW))
        picture = Image.open(io.BytesIO(content)).resize((across, down))
        page.alpha_composite(picture, (round(OVERVIEW_DPI * left), round(OVERVIEW_DPI * (top + TITLE))))
    buffer = io.BytesIO()
    page.save(buffer, "png")
    return buffer.getvalue()


def _write(figure: "Figure", left: float, top: float, text: str, **style: Any) -> None:
    """Text that begins so many inches from the figure's left and upper edge."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1.0 - top / height, _plain(text), ha="left", va="top", color="#1f2328", **style)


def _draw(axes: "Axes", panel: Panel, runs: list[RunData]) -> None:
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    panel.draw(axes, [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs) if _has(run, panel)])
    axes.set_xlabel("tokens" if panel.by_tokens else "step", color=INK, fontsize=8)
    axes.yaxis.label.set_color(INK)
    axes.yaxis.label.set_fontsize(8)
    if not panel.wide:
        axes.margins(x=0.01)
    if not panel.still:
        show_the_curve(axes)
    if len(runs) == 1:
        _mark_restarts(axes, runs[0], panel)
    if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, labelcolor=INK, frameon=False)


def _loss(*, by_tokens: bool) -> Callable[["Axes", Coloured], None]:
    def draw(axes: "Axes", runs: Coloured) -> None:
        from matplotlib.ticker import EngFormatter

        several = len(runs) > 1
        for run, colour in runs:
            places = partial(_tokens, run) if by_tokens else list
            name = _plain(run.name) if several else "training"
            _line(axes, run.points.get(LOSS, []), colour, name, smooth=True, places=places)
            validation = run.points.get(VALIDATION, [])
            if validation:
                steps, values = places([p.step for p in validation]), [p.value for p in validation]
                accent = colour if several else COLOURS[1]
                label = None if several else "validation"
                axes.plot(
                    steps, values, "o--" if several else "o-", color=accent, markersize=4, linewidth=1.2, label=label
                )
        counted = " or ".join(sorted({run.counted for run, _ in runs}, reverse=True))
        axes.set_ylabel(f"nats per {counted}" + (" (dashed: validation)" if several else ""))
        if by_tokens:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return draw


def _draw_bits(axes: "Axes", runs: Coloured) -> None:
    for run, colour in runs:
        points = run.points[BITS_PER_BYTE]
        steps, values = [p.step for p in points], [p.value for p in points]
        axes.plot(steps, values, "o-", color=colour, markersize=4, label=_plain(run.name) if len(runs) > 1 else None)
    for order0 in sorted({run.order0_entropy for run, _ in runs if run.order0_entropy is not None}):
        axes.axhline(order0, color=INK, linestyle=":", label=f"byte frequencies alone: {order0:.3f}")
    axes.set_ylabel("bits per byte")


def _draw_sources(axes: "Axes", runs: Coloured) -> None:
    points = runs[0][0].points
    prefix = next(prefix for prefix in OF_SOURCES if _family(prefix, runs[0][0]))
    names = sorted(name for name in points if name.startswith(prefix))
    for index, name in enumerate(names):
        lap, colour = divmod(index, len(COLOURS))
        steps, values = [p.step for p in points[name]], [p.value for p in points[name]]
        style, label = ("o-", "s--", "^:")[lap % 3], _plain(name.removeprefix(prefix))
        axes.plot(steps, values, style, color=COLOURS[colour], markersize=4, linewidth=1.2, label=label)
    axes.set_ylabel("bits per byte" if prefix.startswith(BITS_PER_BYTE) else "nats per label")
    if len(names) > SOURCES_INSIDE:
        columns = math.ceil(len(names) / 16)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, labelcolor=INK, frameon=False, ncols=columns
        )


def _metric(name: Metric, *, smooth: bool = False, from_zero: bool = False) -> Callable[["Axes", Coloured], None]:
    def draw(axes: "Axes", runs: Coloured) -> None:
        for run, colour in runs:
            _line(axes, run.points[name], colour, _plain(run.name) if len(runs) > 1 else None, smooth=smooth)
        axes.set_ylabel(name.unit)
        if from_zero:
            begin_at_zero(axes)

    return draw


def _draw_mfu(axes: "Axes", runs: Coloured) -> None:
    from matplotlib.ticker import PercentFormatter

    _metric(MFU, smooth=True, from_zero=True)(axes, runs)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_memory(axes: "Axes", runs: Coloured) -> None:
    for run, colour in runs:
        several = len(runs) > 1
        peak = run.points.get(PEAK_MEMORY, [])
        _line(axes, run.points.get(MEMORY, []), colour, _plain(run.name) if several else "in use")
        _line(axes, peak, colour, "peak" if peak and not several else None, style="--")
    begin_at_zero(axes)
    axes.set_ylabel("GiB a device" + (" (dashed: peak)" if len(runs) > 1 else ""))


def _draw_time(axes: "Axes", runs: Coloured) -> None:
    """The parts of a step on top of each other; what none of them explains is `other`."""
    import numpy as np

    points = runs[0][0].points
    whole = points[STEP_MS]
    steps = [p.step for p in whole]
    before = 2 * steps[0] - steps[1] if len(steps) > 1 else 0  # each value is a mean over the steps since the last one
    rows = {}
    for label, name in TIME_PARTS.items():
        values = {p.step: p.value for p in points.get(name, [])}
        rows[label] = np.nan_to_num([values.get(step, 0.0) for step in steps])
    named = np.sum(list(rows.values()), axis=0)
    rows["other"] = np.maximum(np.nan_to_num([p.value for p in whole]) - named, 0.0)
    rows = {label: values for label, values in rows.items() if values.any()}
    colours = [*COLOURS[: len(rows) - ("other" in rows)], INK]
    areas = [[values[0], *values] for values in rows.values()]
    axes.stackplot([before, *steps], areas, labels=list(rows), colors=colours, alpha=0.8, linewidth=0, step="pre")
    total = np.sum(areas, axis=0)
    axes.set_ylim(0.0, 1.1 * float(np.percentile(total, 98)) or 1.0)  # the first step's start-up must not hide the rest
    axes.set_ylabel("ms a step")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True, fontsize=8, labelcolor=INK, frameon=False
    )  # beside it: there is no empty place inside


def _sites(prefix: str, highest: float | None, lowest: float = 0.0) -> Callable[["Axes", Coloured], None]:
    def draw(axes: "Axes", runs: Coloured) -> None:
        heat_map(axes, runs[0][0].points, prefix, highest, lowest)

    return draw


def _of(title: str, name: Metric, *, smooth: bool = False, from_zero: bool = False) -> Panel:
    """The panel of one metric."""
    draw = _metric(name, smooth=smooth, from_zero=from_zero)
    return Panel(title, (name,), draw, smooth=smooth, from_zero=from_zero)


def _map(title: str, metric: Metric, highest: float | None, lowest: float = 0.0) -> Panel:
    """The panel of a metric of single masks, heads or steps."""
    return Panel(title, (metric.family,), _sites(metric.family, highest, lowest), single=True, wide=True, still=True)


PANELS = (
    Panel("Loss", (LOSS, VALIDATION), _loss(by_tokens=False), smooth=True),
    Panel("Loss by tokens", (LOSS, VALIDATION), _loss(by_tokens=True), by_tokens=True, smooth=True),
    Panel("Validation, bits per byte", (BITS_PER_BYTE,), _draw_bits),
    Panel("Validation by source", OF_SOURCES, _draw_sources, single=True),
    _of("Validation in the text's own order", VALIDATION_IN_ORDER),
    *(_of(f"Validation, {said}", metric) for metric, said in LABEL_SCORES.items()),
    _of("Draft loss", DRAFT_LOSS, smooth=True),
    _of("Loss read from an earlier step of refinement", EARLIER_LOSS, smooth=True),
    _of("Learning rate", LEARNING_RATE),
    _of("Gradient norm", GRAD_NORM, smooth=True),
    _of("Update ratio", UPDATE_RATIO, smooth=True),
    _of("Throughput", TOKENS_PER_SECOND, smooth=True, from_zero=True),
    Panel("MFU", (MFU,), _draw_mfu, smooth=True, from_zero=True),
    Panel("Where the time went", (TIME_PARTS["forward"],), _draw_time, single=True, still=True),
    _of("Goodput", GOODPUT, from_zero=True),
    _of("Rank spread", RANK_SPREAD, smooth=True),
    Panel("Memory", (MEMORY, PEAK_MEMORY), _draw_memory, from_zero=True),
    _map("Change of the vectors by step of refinement", REFINE_CHANGE, None),
    _of("Steps a token takes", PONDER_STEPS),
    _map("Tokens by the steps they take", PONDER_SHARE, 1.0),
    _of("Gate density", DENSITY),
    _map("Gate density by site and layer", DENSITY, 1.0),
    _map("Multiplier of the gates' density by site and layer", MULTIPLIER, None),
    _map("Gate entropy by site and layer", GATE_ENTROPY, None),
    _map("Alpha of entmax by head", ALPHA, 2.0, 1.0),
    _map("Span by head, in tokens", SPAN, None),
    _map("Fullest cluster by head", FULLEST, 1.0),
    _map("Empty clusters by head", EMPTY, 1.0),
    _map("Pairs in clusters that are left out, by head", DROPPED, 1.0),
    _map("Keys with weight 0 by head", ZEROS, 1.0),
)


def _has(run: RunData, panel: Panel) -> bool:
    if panel.by_tokens and TOKENS_SEEN not in run.points:
        return False
    return any(name in run.points or _family(name, run) for name in panel.metrics)


def _family(prefix: str, run: RunData) -> bool:
    return prefix.endswith("/") and any(name.startswith(prefix) for name in run.points)


def _line(
    axes: "Axes",
    points: list[Point],
    colour: str,
    label: str | None,
    *,
    smooth: bool = False,
    style: str = "-",
    places: Callable[[list[int]], Sequence[float]] = list,
) -> None:
    """A curve over `places` of its steps; what is not finite is a red cross on the axis."""
    import numpy as np

    steps, values = np.array(places([p.step for p in points])), np.array([p.value for p in points])
    finite = np.isfinite(values)
    if not finite.all():
        axes.plot(steps[~finite], np.zeros((~finite).sum()), "x", color="#ef4444", transform=axes.get_xaxis_transform())
    if not smooth or finite.sum() < SMOOTH_FROM:
        axes.plot(steps, values, style, color=colour, linewidth=1.4, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    steps, values = steps[finite], values[finite]
    width = max(5, len(values) // 50)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    axes.plot(steps, (sums[high] - sums[low]) / (high - low), color=colour, linewidth=1.6, label=label)


def _tokens(run: RunData, steps: list[int]) -> Sequence[float]:
    """Tokens seen at each step; between recorded ones a straight line."""
    import numpy as np

    seen = run.points[TOKENS_SEEN]
    values: list[float] = np.interp(steps, [p.step for p in seen], [p.value for p in seen]).tolist()
    return values


def _mark_restarts(axes: "Axes", run: RunData, panel: Panel) -> None:
    resumed = (start.fields.get("resumed_from") for start in run.starts)
    steps = sorted({step for step in resumed if step is not None})
    label = "resumed" if LOSS in panel.metrics else None
    for place in _tokens(run, steps) if panel.by_tokens else steps:
        axes.axvline(place, color=INK, linestyle="--", linewidth=0.9, alpha=0.8, label=label)
        label = None


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula, nor a leading underscore as 'no legend'."""
    return text.replace("$", r"\$").lstrip("_") or "run"


def png(figure: "Figure", dpi: int) -> bytes:
    """The figure as it is written to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # `savefig` draws twice where something is laid out
    return buffer.getvalue()
