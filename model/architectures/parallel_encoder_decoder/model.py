"""The encoder-decoder (docs/model.md A): two causal streams over the same tokens, by default side by side.

Layer l of the decoder reads what layer l of the encoder gives; the encoder never reads the decoder. In the serial
topology, which the parallel one is to be held beside, every decoder layer reads what the last encoder layer gives.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain, repeat

from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.parallel_encoder_decoder.encoder_loss import EncoderLoss
from model.architectures.parallel_encoder_decoder.spec import ParallelEncoderDecoderConfig
from model.layers.layers import Linear, stream_norm
from model.masks.site import Statistics


class ParallelEncoderDecoder(Backbone):
    """L encoder and L decoder layers; the decoder starts from a linear map of the embedded tokens."""

    def __init__(self, config: ParallelEncoderDecoderConfig) -> None:
        """The layers of both streams, and what lies between them."""
        super().__init__()
        self.config = config
        self.output_norm = stream_norm(config) if config.subtract_next_position == "layer_norm" else nn.Identity()
        # The decoder has no residual path from the embeddings: a smaller start would starve it.
        std = config.decoder_input_std or config.width**-0.5
        self.decoder_input_norm = stream_norm(config) if config.decoder_input_norm else nn.Identity()
        self.decoder_input = Linear(config.width, config.width, bias=config.bias, std=std)
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))
        # Not made when it is off: parameters without a gradient would break data parallelism.
        self.encoder_loss = None if config.encoder_loss.kind == "none" else EncoderLoss(config)

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        statistics = embedded.statistics.copy()
        outputs = self._encode(embedded, keys, statistics)
        first = next(outputs)
        if self.config.topology == "serial":
            [first] = deque(outputs, maxlen=1)
            outputs = repeat(first)
        elif self.config.cross_source == "layer_input":
            outputs = chain([first], outputs)
        x: Tensor = self.decoder_input(self.decoder_input_norm(first))
        if self.config.add_next_position:
            assert embedded.next_positions is not None
            x = x + embedded.next_positions
        for layer in self.decoder:
            output = next(outputs)
            x, masks = layer(x, output, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
        if keys is None or self.encoder_loss is None:
            return Hidden(x, statistics)
        found = self.encoder_loss(embedded.tokens, output, embedded.visible)
        metrics = {name: value.detach() for name, value in found.items()}
        return Hidden(x, statistics, self.config.encoder_loss.weight * found["encoder_loss"], metrics)

    def finish(self, x: Tensor, embedded: Embedded) -> Tensor:
        """Take the position vector of the token to predict off, where it is configured."""
        if self.config.subtract_next_position == "none":
            return x
        assert embedded.next_positions is not None
        finished: Tensor = self.output_norm(x - embedded.next_positions)
        return finished

    def _encode(self, embedded: Embedded, keys: Tensor | None, statistics: Statistics) -> Iterator[Tensor]:
        """The embedded tokens, then the output of each encoder layer, computed when it is asked for."""
        x = embedded.tokens
        yield x
        for layer in self.encoder:
            x, masks = layer(x, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
            yield x
