"""What the charts of a page are drawn from: the curves of a panel, for the script that draws them (`charts.js`)."""

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from pretrain.metric_names import BITS_PER_BYTE, LOSS, MEMORY, PEAK_MEMORY, REGISTRY, TOKENS_SEEN, VALIDATION
from pretrain.report.plots import COLOURS, Panel
from pretrain.run.journal import Point
from pretrain.run.run_summary import RunData

MOST_POINTS = 1000
"""Of a curve: a chart has fewer columns."""
CALLED: dict[str, str] = {LOSS: "training", VALIDATION: "validation", MEMORY: "in use", PEAK_MEMORY: "peak"}
DIGITS = 6
"""Significant ones that the page holds."""


def script() -> str:
    """What draws them."""
    return (files("pretrain.report") / "charts.js").read_text(encoding="utf-8")


def data_of(panel: Panel, runs: list[RunData]) -> str | None:
    """The curves as JSON; None for a panel that is a picture only."""
    if panel.still:
        return None
    curves: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        if panel.by_tokens and TOKENS_SEEN not in run.points:
            continue
        for index, name in enumerate(name for name in _names(panel, run) if run.points.get(name)):
            colour = number if len(runs) > 1 else index
            curve = _curve(run, run.points[name], by_tokens=panel.by_tokens)
            curves.append(
                curve
                | {
                    "name": _called(panel, run, name, len(runs) > 1),
                    "colour": COLOURS[colour % len(COLOURS)],
                    "dash": len(runs) > 1 and name in (VALIDATION, PEAK_MEMORY),
                    "dots": len(run.points[name]) <= 50,
                    "smooth": panel.smooth,
                }
            )
    if not curves:
        return None
    unit = REGISTRY[panel.metrics[0]].unit if panel.metrics[0] in REGISTRY else panel.title.lower()
    levels = _levels(runs) if BITS_PER_BYTE in panel.metrics else []
    axis = "tokens" if panel.by_tokens else "step"
    whole = {"unit": unit, "x": axis, "zero": panel.from_zero, "levels": levels, "series": curves}
    return json.dumps(whole, allow_nan=False).replace("<", "\\u003c")


def _levels(runs: list[RunData]) -> list[dict[str, Any]]:
    """What bits per byte are compared with."""
    known = sorted({run.order0_entropy for run in runs if run.order0_entropy is not None})
    return [{"y": level, "name": f"byte frequencies alone: {level:.4g}"} for level in known if math.isfinite(level)]


def _names(panel: Panel, run: RunData) -> list[str]:
    """Of the curves; of families the first that the run has."""
    for name in panel.metrics:
        if name.endswith("/") and (found := sorted(n for n in run.points if n.startswith(name))):
            return found
    return [name for name in panel.metrics if not name.endswith("/")]


def _called(panel: Panel, run: RunData, name: str, several: bool) -> str:
    if several:
        beside = name in (VALIDATION, PEAK_MEMORY) and len(panel.metrics) > 1
        return f"{run.name} {CALLED[name]}" if beside else run.name
    family = next((metric for metric in panel.metrics if metric.endswith("/") and name.startswith(metric)), None)
    return name.removeprefix(family) if family else CALLED.get(name, panel.title.lower())


def _curve(run: RunData, points: Sequence[Point], *, by_tokens: bool) -> dict[str, list[Any]]:
    stride = math.ceil(len(points) / MOST_POINTS)
    kept = [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]
    places: Sequence[float] = [point.step for point in kept]
    if by_tokens:
        seen = run.points[TOKENS_SEEN]
        places = np.interp(places, [p.step for p in seen], [p.value for p in seen]).round().astype(int).tolist()
    values = [float(f"{p.value:.{DIGITS}g}") if math.isfinite(p.value) else None for p in kept]
    return {"x": list(places), "y": values}
