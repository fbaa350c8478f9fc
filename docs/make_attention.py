"""Draws docs/images/attention.png, what each pattern lets a query see, from the rule that the model computes by.

python docs/make_attention.py
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from model.attention.rule import Rows
from model.config.pattern_config import PatternConfig

PICTURE = Path(__file__).with_name("images") / "attention.png"
TOKENS = 16
SHOWN: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({}, True),
    "window 4": ({"kind": "window", "window": 4}, True),
    "window 4, both ways": ({"kind": "window", "window": 4}, False),
    "window 4, sinks 2": ({"kind": "window", "window": 4, "sinks": 2}, True),
    "window 4, globals 2 and 9": ({"kind": "window", "window": 4, "globals": [2, 9]}, True),
    "strided 4": ({"kind": "strided", "stride": 4}, True),
    "fixed 4": ({"kind": "fixed", "stride": 4}, True),
    "fixed 4, both ways": ({"kind": "fixed", "stride": 4}, False),
}
"""Options, and whether the text is read forwards only. With `merge=heads` both parts are there, each in its colour."""
COLOURS = ListedColormap(["#f3f1ec", "#2457a6", "#d98c2b", "#5b3f8c"])
"""Not seen; seen by the first part, by the second, by both."""
INK = "#1f2328"


def main() -> None:
    """Write the file."""
    figure = Figure(figsize=(10, 5.6))
    for number, (title, (options, causal)) in enumerate(SHOWN.items()):
        panel(figure.add_subplot(2, 4, number + 1), title, options, causal)
    figure.text(0.01, 0.015, LEGEND, fontsize=9, color=INK)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.94, bottom=0.1, wspace=0.12, hspace=0.25)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


LEGEND = (
    "Rows are queries, columns keys, from the first token of a text on. Two colours: the two parts of a pattern, which "
    "`merge` puts together; violet: both."
)


def seen(options: dict[str, Any], causal: bool) -> torch.Tensor:
    """[T, T] int: 1 where the first part of a pattern lets a query see a key, 2 the second, 3 both."""
    merge = {"merge": "heads"} if options.get("kind") in ("strided", "fixed") else {}
    parts = PatternConfig.model_validate(options | merge).of_layer(0, TOKENS)
    rows = Rows(torch.Size((1, TOKENS)), torch.device("cpu"), causal)
    return sum((rows.dense((part,))[0, 0].int() << number for number, part in enumerate(parts)), torch.zeros(()).int())


def panel(axes: Axes, title: str, options: dict[str, Any], causal: bool) -> None:
    """One pattern."""
    axes.pcolormesh(
        seen(options, causal).flip(0).numpy(), cmap=COLOURS, vmin=0, vmax=3, edgecolor="white", linewidth=0.8
    )
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, color=INK)
    axes.axis("off")


if __name__ == "__main__":
    main()
