"""What an architecture is made of: layers between the embedded tokens and the vectors that the head reads."""

from typing import NamedTuple

from torch import Tensor, nn

from model.attention.visibility import Visible
from model.masks.site import Statistics


class Embedded(NamedTuple):
    """A text in vectors, which a stream starts from."""

    tokens: Tensor
    """E [B, T, C]: the tokens, with their positions where these are added."""
    next_positions: Tensor | None
    """[T, C] or [B, T, C]: the position vectors of the tokens to predict, where the model uses them."""
    mask_source: Tensor | None
    """[B, T, C], where all masks come from one source."""
    visible: Visible
    """To self attention."""
    statistics: Statistics
    """Of the mask on E."""


class SourceSequence(NamedTuple):
    """The sequence that is read where another is written (`Traits.two_sequences`)."""

    embedded: Embedded
    across: Visible
    """What the written sequence may see of it."""


class Hidden(NamedTuple):
    """What a backbone computes."""

    x: Tensor
    """[B, T, C], before the last norm; in a causal model vector t depends on tokens up to t only."""
    statistics: Statistics = {}  # noqa: RUF012 - never changed
    """Of its masks, those of the embedded texts included."""
    auxiliary: Tensor | None = None
    """0-d: a loss of its own beside that of the tokens, with its weight; in training only."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """What is told about that loss: detached; in validation, too, where it is known."""


class Backbone(nn.Module):
    """The layers of an architecture. `TokenModel` has the tables before them and the head behind them."""

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """Run the layers.

        Args:
            embedded: the text in which tokens are predicted.
            keys: [B] int64, which key the noise of training; None asks for evaluation.
            source: the text that is read for it, where the architecture has two.
        """
        raise NotImplementedError

    def finish(self, x: Tensor, embedded: Embedded) -> Tensor:
        """What comes between the last norm and the head, [B, T, C] -> [B, T, C]: nothing unless overridden."""
        return x


def one_stream(layers: nn.ModuleList, embedded: Embedded, keys: Tensor | None) -> tuple[Tensor, Statistics]:
    """Encoder layers, one after the other: x [B, T, C], and the statistics of all masks up to there."""
    x, statistics = embedded.tokens, embedded.statistics.copy()
    for layer in layers:
        x, masks = layer(x, keys, embedded.mask_source, embedded.visible)
        statistics |= masks
    return x, statistics
