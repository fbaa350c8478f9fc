"""What a page shows of probes: a table, lines by layer, and a map of likenesses."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.probing.features import QUESTIONS
from pretrain.probing.findings import Findings, Probed
from pretrain.report.axes import INK
from pretrain.report.plots import COLOURS, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "probes"
"""Of the table in a study's page; its pictures are `probes-answers` and `probes-likeness`."""
NUMBERED = 32
"""Of at most so many states the map of likenesses has numbers in it."""
_COLUMNS = 4


def table(found: Findings) -> Iterator[str]:
    """The lines of the table: bits of each state, in brackets those of a model that was not trained."""
    train, test = found.tokens
    apart = "no document is in both" if found.apart == "documents" else "one document, which was cut"
    yield (
        f"Bits that linear probes tell of the answer, on {test:,} tokens; {train:,} others train them ({apart}). In "
        "brackets: of a model of the same shape that was not trained."
    )
    yield ""
    yield "| run | state | " + " | ".join(QUESTIONS[name] for name in found.questions) + " |"
    yield "|---" * (2 + len(found.questions)) + "|"
    yield "| *all there are to tell* | | " + " | ".join(f"{q.entropy:.2f}" for q in found.questions.values()) + " |"
    for state in found.states:
        cells = (f"{state.trained[n].bits:.3f} ({state.random[n].bits:.3f})" for n in found.questions)
        yield f"| {state.run} | {state.name} | " + " | ".join(cells) + " |"


def pictures(found: Findings) -> dict[str, bytes]:
    """PNG by name."""
    return {f"{NAME}-answers": _answers(found), f"{NAME}-likeness": _likeness(found)}


def _answers(found: Findings) -> bytes:
    """A plot a question, a line a stream; dashed of a model that was not trained."""
    from matplotlib.figure import Figure

    rows = -(-len(found.questions) // _COLUMNS)
    figure = Figure(figsize=(13.0, 2.9 * rows), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, (name, question) in zip(grid.flat, found.questions.items(), strict=False):
        for (label, states), colour in zip(_streams(found).items(), COLOURS * len(found.states), strict=False):
            depths = [state.depth for state in states]
            axes.plot(depths, [state.trained[name].bits for state in states], "o-", color=colour, label=label, ms=3)
            axes.plot(depths, [state.random[name].bits for state in states], "--", color=colour, lw=0.9)
        axes.set_title(f"{QUESTIONS[name]}: bits of {question.entropy:.2f}", loc="left", fontsize=10)
        axes.set_xlabel("layers passed", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    for axes in list(grid.flat)[len(found.questions) :]:
        axes.axis("off")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return png(figure, dpi=100)


def _streams(found: Findings) -> dict[str, list[Probed]]:
    """States by stream, each from the embedded tokens on."""
    embedded = {state.run: state for state in found.states if not state.depth}
    streams: dict[str, list[Probed]] = {}
    for state in found.states:
        if state.depth:
            streams.setdefault(f"{state.run}: {state.stream}", [embedded[state.run]]).append(state)
    return streams


def _likeness(found: Findings) -> bytes:
    """Each state beside each, from the first to the last."""
    from matplotlib.figure import Figure

    count = len(found.states)
    side = max(4.0, 0.3 * count + 2.5)
    figure = Figure(figsize=(side + 0.8, side), facecolor="white", layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(found.likeness, cmap="viridis", vmin=0.0, vmax=1.0)
    labels = [f"{state.run}: {state.name}" for state in found.states]
    axes.set_xticks(range(count), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(count), labels, fontsize=8)
    if count <= NUMBERED:
        _write_numbers(axes, found.likeness)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, shrink=0.8)
    bar.outline.set_visible(False)
    return png(figure, dpi=100)


def _write_numbers(axes: "Axes", table: list[list[float]]) -> None:
    """In hundredths."""
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(
                x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color="w" if value < 0.6 else "k"
            )
