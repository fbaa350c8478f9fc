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
from model.architectures.recurrence import Hold, Recurrence, Repeated, Streams
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
        self.recurrence = None if config.recurrence.steps == 1 else Recurrence(config, streams=2)
        # Not made when it is off: parameters without a gradient would break data parallelism.
        self.encoder_loss = None if config.encoder_loss.kind == "none" else EncoderLoss(config)

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`."""
        statistics = embedded.statistics.copy()
        if self.recurrence is not None:
            return self._repeated(self.recurrence, embedded, keys)
        outputs = self._encode(embedded, keys, statistics)
        first = next(outputs)
        if self.config.topology == "serial":
            [first] = deque(outputs, maxlen=1)
            outputs = repeat(first)
        elif self.config.cross_source == "layer_input":
            outputs = chain([first], outputs)
        x = self._begin(embedded, first)
        for layer in self.decoder:
            output = next(outputs)
            x, masks = layer(x, output, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
        return self._compared(Hidden(x, statistics), output, embedded, keys)

    def finish(self, x: Tensor, embedded: Embedded) -> Tensor:
        """Take the position vector of the token to predict off, where it is configured."""
        if self.config.subtract_next_position == "none":
            return x
        assert embedded.next_positions is not None
        finished: Tensor = self.output_norm(x - embedded.next_positions)
        return finished

    def _begin(self, embedded: Embedded, first: Tensor) -> Tensor:
        """What the decoder starts from, [B, T, C]."""
        x: Tensor = self.decoder_input(self.decoder_input_norm(first))
        if self.config.add_next_position:
            assert embedded.next_positions is not None
            x = x + embedded.next_positions
        return x

    def _compared(self, found: Hidden, output: Tensor, embedded: Embedded, keys: Tensor | None) -> Hidden:
        """With the loss of the encoder's output [B, T, C], where there is one."""
        if keys is None or self.encoder_loss is None:
            return found
        told = self.encoder_loss(embedded.tokens, output, embedded.visible)
        metrics = found.metrics | {name: value.detach() for name, value in told.items()}
        return found._replace(auxiliary=self.config.encoder_loss.weight * told["encoder_loss"], metrics=metrics)

    def _repeated(self, recurrence: Recurrence, embedded: Embedded, keys: Tensor | None) -> Hidden:
        """Both streams side by side through all pairs of layers, several times."""
        visible, source = embedded.visible, embedded.mask_source

        def apply(streams: Streams, keys: Tensor | None, hold: Hold) -> tuple[Streams, Statistics]:
            output, x = streams
            statistics: Statistics = {}
            for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
                after, of_encoder = encoder(output, keys, source, visible)
                output = hold(output, after)
                after, of_decoder = decoder(x, output, keys, source, visible)
                x = hold(x, after)
                statistics |= of_encoder | of_decoder
            return (output, x), statistics

        def keep(streams: Streams, steps: range) -> None:
            output, x = streams
            for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
                assert isinstance(encoder, EncoderLayer) and isinstance(decoder, DecoderLayer)
                encoder.keep(output, visible, steps)
                decoder.keep(x, output, visible, steps)

        found: Repeated = recurrence(apply, keep, (embedded.tokens, self._begin(embedded, embedded.tokens)), keys)
        return self._compared(found.hidden(embedded, recurrence.steps), found.streams[0], embedded, keys)

    def _encode(self, embedded: Embedded, keys: Tensor | None, statistics: Statistics) -> Iterator[Tensor]:
        """The embedded tokens, then the output of each encoder layer, computed when it is asked for."""
        x = embedded.tokens
        yield x
        for layer in self.encoder:
            x, masks = layer(x, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
            yield x
