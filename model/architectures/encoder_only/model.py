"""The encoder-only baseline for masked language modelling, in the manner of BERT (Devlin et al. 2019).

The head is the tied table alone: no map before it, no bias.
"""

from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import EncoderLayer
from model.architectures.encoder_only.spec import EncoderOnlyConfig
from model.architectures.recurrence import Recurrence, one_repeated_stream


class EncoderOnly(Backbone):
    """L layers of self attention over all of the sequence, and feed forward."""

    def __init__(self, config: EncoderOnlyConfig) -> None:
        """The layers."""
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.recurrence = None if config.recurrence.steps == 1 else Recurrence(config)

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        if self.recurrence is None:
            return Hidden(*one_stream(self.layers, embedded, keys))
        return one_repeated_stream(self.recurrence, self.layers, embedded, keys)
