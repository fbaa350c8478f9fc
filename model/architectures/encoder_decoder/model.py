"""The encoder-decoder of two sequences, in the manner of T5 (Raffel et al. 2020, arXiv:1910.10683).

The encoder reads a text, all of it at every position; the decoder writes another, token by token: what is missing of
the first, or the target of a pair.
"""

from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.encoder_decoder.spec import EncoderDecoderConfig


class EncoderDecoder(Backbone):
    """L encoder layers, then L decoder layers that each read the encoder's output."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        """The layers of both."""
        super().__init__()
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        assert source is not None
        read, statistics = one_stream(self.encoder, source.embedded, keys)
        statistics |= embedded.statistics
        x = embedded.tokens
        for layer in self.decoder:
            x, masks = layer(x, read, keys, embedded.mask_source, embedded.visible, source.across)
            statistics |= masks
        return Hidden(x, statistics)
