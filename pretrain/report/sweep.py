"""The picture of a model that was validated with several values of a key (`duet eval --set KEY=A,B,… --plot FILE`)."""

from collections.abc import Mapping

from pretrain.metric_names import VALIDATION
from pretrain.report.axes import INK
from pretrain.report.plots import COLOURS, png


def loss_by_value(key: str, found: Mapping[str, Mapping[str, float]], trained_with: str) -> bytes:
    """A PNG of the validation loss against the values of a key, in their order.

    Args:
        found: validation metrics by value.
        trained_with: the value of the training, which is marked where it is among them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    losses = [metrics[VALIDATION] for metrics in found.values()]
    axes.plot(range(len(found)), losses, "o-", color=COLOURS[0], linewidth=1.4)
    axes.set_xticks(range(len(found)), list(found))
    if trained_with in found:
        axes.axvline(list(found).index(trained_with), color=INK, linestyle="--", linewidth=0.9, label="trained with")
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel(key, color=INK, fontsize=8)
    axes.set_ylabel(VALIDATION.unit, color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    return png(figure, dpi=180)
