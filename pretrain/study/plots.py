"""The pictures of a study: curves of the arms of a section, and its masks over training by site."""

import math
from typing import TYPE_CHECKING

from pretrain.metric_names import DENSITY, GATE_ENTROPY, MASK_MEAN, NEAR_ONE, NEAR_ZERO
from pretrain.report.axes import INK
from pretrain.report.heat_map import heat_map
from pretrain.report.plots import COLOURS, png
from pretrain.study.results import Result, Results, mean
from pretrain.study.spec import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASKS = {
    MASK_MEAN: MASK_MEAN.unit,
    NEAR_ZERO: NEAR_ZERO.unit,
    NEAR_ONE: NEAR_ONE.unit,
}
INSIDE = 16
"""So many arms at most are named within a picture."""
STYLES = ("o-", "s--", "^:", "D-.")
"""The lines of as many arms as there are colours, then of as many more; all of them differ."""
HEAT = {DENSITY.family: ("open in training", 1.0), GATE_ENTROPY.family: ("entropy, bits", None)}


def pictures(study: Study, results: Results) -> dict[str, bytes]:
    """PNG by name: SECTION-validation, SECTION-masks and SECTION-sites, where there is something to show."""
    found = {}
    for name, section in study.sections.items():
        if section.settings:
            continue
        rows = [tuple(other.split("/")) for other in section.beside] + [(name, arm) for arm in section.arms]
        arms = {arm: runs for owner, arm in rows if (runs := results.of(owner, arm))}
        if not any(owner == name and arm in arms for owner, arm in rows):
            continue
        found[f"{name}-validation"] = _validation(arms, section.unit)
        masked = {arm: runs for arm, runs in arms.items() if MASK_MEAN in runs[0].points}
        if masked:
            found[f"{name}-masks"] = _masks(masked)
            found[f"{name}-sites"] = _sites(masked)
    return found


def _validation(arms: dict[str, list[Result]], unit: str) -> bytes:
    """All of training, and its last half enlarged: the mean of the seeds, from the lowest to the highest in pale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), facecolor="white", layout="constrained")
    whole, end = figure.subplots(1, 2)
    for index, (arm, runs) in enumerate(arms.items()):
        for axes in (whole, end):
            _band(axes, runs, runs[0].metric, *_look(index), arm)
    for axes, title in ((whole, "Validation"), (end, "Its second half")):
        _plain(axes, title)
        axes.set_ylabel(unit)
    steps = max(run.config.train.steps for runs in arms.values() for run in runs)
    late = [p.value for runs in arms.values() for r in runs for p in r.points.get(r.metric, []) if p.step >= steps // 2]
    late = [value for value in late if math.isfinite(value)]  # one that diverged may have none
    margin = 0.05 * (max(late) - min(late)) if late else 0.0
    end.set_xlim(steps / 2, steps)
    if margin:
        end.set_ylim(min(late) - margin, max(late) + margin)
    if len(arms) > INSIDE:
        names = end.get_legend_handles_labels()
        columns = math.ceil(len(arms) / INSIDE)
        figure.legend(*names, loc="outside right upper", fontsize=7, frameon=False, ncols=columns)
    else:
        end.legend(fontsize=7, frameon=False)
    return png(figure, dpi=100)


def _masks(arms: dict[str, list[Result]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 3.6), facecolor="white", layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(MASKS)), MASKS.items(), strict=True):
        for index, (arm, runs) in enumerate(arms.items()):
            colour, style = _look(index)
            _band(axes, runs, metric, colour, style[1:], arm)
        _plain(axes, title)
        axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=7, frameon=False)
    return png(figure, dpi=100)


def _sites(arms: dict[str, list[Result]]) -> bytes:
    """A row an arm, of its first seed: density and entropy by site and layer."""
    from matplotlib.figure import Figure

    rows = max(len([n for n in runs[0].points if n.startswith(DENSITY.family)]) for runs in arms.values())
    height = max(1.6, 0.22 * rows + 0.8)
    figure = Figure(figsize=(13.0, height * len(arms)), facecolor="white", layout="constrained")
    table = figure.subplots(len(arms), len(HEAT), squeeze=False)
    for line, (arm, runs) in zip(table, arms.items(), strict=True):
        for axes, (prefix, (title, highest)) in zip(line, HEAT.items(), strict=True):
            if not any(metric.startswith(prefix) for metric in runs[0].points):
                axes.axis("off")  # hard-concrete gates have no entropy
                continue
            heat_map(axes, runs[0].points, prefix, highest)
            axes.set_title(f"{arm}, seed {runs[0].run.seed}: {title}", loc="left", fontsize=9)
            axes.tick_params(labelsize=7)
    return png(figure, dpi=90)


def _look(index: int) -> tuple[str, str]:
    """Colour and style of an arm."""
    lap, colour = divmod(index, len(COLOURS))
    return COLOURS[colour], STYLES[lap % len(STYLES)]


def _band(axes: "Axes", runs: list[Result], metric: str, colour: str, style: str, label: str) -> None:
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run.points.get(metric, []):
            if math.isfinite(point.value):
                by_step.setdefault(point.step, []).append(point.value)
    steps = sorted(by_step)
    axes.plot(steps, [mean(by_step[s]) for s in steps], style, color=colour, label=label, linewidth=1.3, markersize=3)
    axes.fill_between(
        steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=colour, alpha=0.15, linewidth=0
    )


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
