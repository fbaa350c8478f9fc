"""The decoder-only baseline, by default in the shape of GPT-2: learned positions, pre-norm, exact GELU, tied head."""

from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import EncoderLayer
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.architectures.recurrence import Recurrence, one_repeated_stream


class DecoderOnly(Backbone):
    """L layers of causal self attention and feed forward."""

    def __init__(self, config: DecoderOnlyConfig) -> None:
        """Layers whose sites are called the decoder's."""
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer, alone=True) for layer in range(config.layers))
        self.recurrence = None if config.recurrence.steps == 1 else Recurrence(config)

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        if self.recurrence is None:
            return Hidden(*one_stream(self.layers, embedded, keys))
        return one_repeated_stream(self.recurrence, self.layers, embedded, keys)
