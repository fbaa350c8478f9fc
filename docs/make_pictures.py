"""Draws docs/images/model.png and docs/images/data.png: `python docs/make_pictures.py`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = Path(__file__).resolve().parent / "images"
INK, ENCODER, DECODER, MASK, DATA = "#1f2328", "#2457a6", "#9a5b00", "#8a2d62", "#2f6f4f"
Place = tuple[float, float]


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A picture of so many inches, whose axes count them."""
    figure = Figure((width, height), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, place: Place, size: Place, text: str, colour: str, *, filled: bool = False) -> None:
    """A labelled box around its middle."""
    (x, y), (width, height) = place, size
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour if filled else "#ffffff",
        edgecolor=colour,
        linewidth=1.2,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, fontsize=10, ha="center", va="center", color="#ffffff" if filled else INK, linespacing=1.4)


def arrow(axes: Axes, begin: Place, end: Place, colour: str = INK) -> None:
    """From one place to another."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.3))


def layer(axes: Axes, x: float, y: float, name: str, parts: list[str], colour: str, side: int) -> None:
    """A layer: what it adds to the stream, from below; the last part is followed by a mask."""
    axes.text(x + 1.45 * side, y + 0.12, name, fontsize=12, ha="center", va="center", color=colour)
    for number, part in enumerate(parts):
        box(axes, (x, y - 0.3 + 0.42 * number), (2.3, 0.36), part, colour)
    box(axes, (x, y - 0.3 + 0.42 * len(parts)), (2.3, 0.36), "× learned dropout", MASK, filled=True)


def model() -> Figure:
    """Two streams over the same tokens, side by side (docs/model.md A and B)."""
    figure, axes = blank(8.6, 6.2)
    left, right = 2.4, 6.2
    cross = ["self attention", "attention to the encoder", "feed forward"]
    box(axes, (left, 0.4), (3.4, 0.44), "E: tokens and their positions", INK, filled=True)
    box(axes, (right, 0.4), (1.6, 0.44), "linear", DECODER)
    arrow(axes, (left + 1.7, 0.4), (right - 0.8, 0.4))
    axes.text(left, 0.86, "encoder", fontsize=12, ha="center", color=ENCODER, weight="bold")
    axes.text(right, 0.86, "decoder", fontsize=12, ha="center", color=DECODER, weight="bold")
    for number in range(2):
        y = 1.75 + 2.1 * number
        layer(axes, left, y, f"$e_{number + 1}$", ["self attention", "feed forward"], ENCODER, -1)
        layer(axes, right, y, f"$d_{number + 1}$", cross, DECODER, 1)
        arrow(axes, (left + 1.15, y + 0.54), (right - 1.15, y + 0.12), ENCODER)
        arrow(axes, (left, y + 0.72), (left, y + 1.62 if number == 0 else y + 1.3), ENCODER)
        arrow(axes, (right, y + 1.14), (right, y + 1.62 if number == 0 else y + 1.55), DECODER)
    axes.text(left, 5.25, "…", fontsize=14, ha="center", color=ENCODER)
    box(axes, (right, 5.65), (3.4, 0.44), "logits of the next token: E's own table", INK, filled=True)
    axes.text(
        0.6, 5.95, "Every attention is causal: a position sees itself and those before it.", fontsize=10, color=INK
    )
    return figure


def data() -> Figure:
    """From text to a rank's batch (docs/data.md)."""
    steps = [
        ("text", "files, folders, globs, s3://, hf://:\nplain, JSON Lines, Parquet, Arrow"),
        ("documents", "filters, duplicates left out,\na part held out"),
        ("tokens", "SentencePiece, trained on a sample,\nor a tokenizer from elsewhere"),
        ("dataset", "Arrow shards, a hash of each,\na manifest"),
        ("order", "mixture, phases, shuffle: a function\nof the seed and the step alone"),
        ("batch", "windows of tokens, on each rank\nits share, read ahead"),
    ]
    figure, axes = blank(9.6, 3.1)
    for number, (name, what) in enumerate(steps):
        row, column = divmod(number, 3)
        x, y = 1.65 + 3.15 * column, 2.35 - 1.55 * row
        axes.text(x, y + 0.55, name, fontsize=12, ha="center", va="center", color=DATA, weight="bold")
        box(axes, (x, y), (2.75, 0.72), what, DATA)
        if column < 2:
            arrow(axes, (x + 1.375, y), (x + 1.775, y), DATA)
    arrow(axes, (7.95, 1.98), (2.5, 1.18), DATA)
    return figure


if __name__ == "__main__":
    for name, picture in (("model", model()), ("data", data())):
        picture.savefig(IMAGES / f"{name}.png", metadata={"Software": None})
