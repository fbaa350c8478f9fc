"""What an architecture is made of: layers between the embedded tokens and the vectors that the head reads."""

from typing import NamedTuple

from torch import Tensor, nn

from model.attention.visibility import Visible
from model.batch import Batch
from model.layers.layers import TiedEmbedding
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
    ids: Tensor
    """[B, T] int64."""
    table: TiedEmbedding
    """Of the tokens; it is the head, too."""


class SourceSequence(NamedTuple):
    """The sequence that is read where another is written (`Traits.two_sequences`)."""

    embedded: Embedded
    across: Visible
    """What the written sequence may see of it."""


class Earlier(NamedTuple):
    """The same predictions made before all was computed: a second loss of the labels."""

    x: Tensor
    """[B, T, C], as that of `Hidden`."""
    weight: float


class Hidden(NamedTuple):
    """What a backbone computes."""

    x: Tensor
    """[B, T, C], before the last norm; in a causal model vector t depends on tokens up to t only."""
    statistics: Statistics = {}  # noqa: RUF012 - never changed
    """Of its masks, those of the embedded texts included."""
    auxiliary: Tensor | None = None
    """0-d: a loss of its own beside that of the tokens, with its weight; in training only."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """What else is told, by the model's names: about that loss, the layers, or the steps that tokens take; in
    validation, too, where it is known."""
    penalised: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """What has a penalty of the configuration, beside its masks: 0-d, by the penalty's name."""
    earlier: Earlier | None = None
    """In training only."""


class Backbone(nn.Module):
    """The layers of an architecture. `TokenModel` has the tables before them and the head behind them."""

    def beside(self, embedded: Embedded, batch: Batch | None) -> SourceSequence | None:
        """What is read beside the tokens that are predicted, where all is one text: nothing unless overridden.

        `batch`: what else it says of these inputs.
        """
        return None

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
