"""The encoder-decoder (docs/model.md A): two causal streams over the same tokens, by default side by side.

Layer l of the decoder reads what layer l of the encoder gives; the encoder never reads the decoder. In the serial
topology, which the parallel one is to be held beside, every decoder layer reads what the last encoder layer gives.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain, repeat

from torch import Tensor, nn

from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.encoder_loss import EncoderLoss
from model.architectures.pair import Pair
from model.architectures.token_model import Embedded, LanguageModel, Transformed
from model.config.model_config import ModelConfig
from model.layers.layers import Linear, stream_norm
from model.masks.site import Statistics


class ParallelEncoderDecoder(LanguageModel):
    """L encoder and L decoder layers; the decoder starts from a linear map of the embedded tokens."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        # The decoder has no residual path from the embeddings: a smaller start would starve it.
        std = config.decoder_input_std or config.width**-0.5
        self.decoder_input_norm = stream_norm(config) if config.decoder_input_norm else nn.Identity()
        self.decoder_input = Linear(config.width, config.width, bias=config.bias, std=std)
        encoder = [EncoderLayer(config, layer) for layer in range(config.num_encoder_layers)]
        decoder = [DecoderLayer(config, layer) for layer in range(config.layers)]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        if config.streams == "batched":
            # The decoder's first layer goes with the encoder's second, unless it reads what the encoder's first reads.
            self._lead = config.num_encoder_layers - config.layers + 1
            layers = zip(encoder[self._lead :], decoder[:-1], strict=True)
            self.pairs = nn.ModuleList(Pair(config, *pair) for pair in layers)
        # Not made when it is off: parameters without a gradient would break data parallelism.
        self.encoder_loss = None if config.encoder_loss.kind == "none" else EncoderLoss(config)

    def transform(self, embedded: Embedded, keys: Tensor | None) -> Transformed:
        """Run the layers; see `LanguageModel.transform`."""
        plainly_causal = embedded.visible.mask is None and embedded.visible.positions is None
        if self.config.streams == "batched" and plainly_causal:  # not with documents apart, prefixes, or a cache
            return self._side_by_side(embedded, keys)
        statistics = Statistics()
        outputs = self._encode(embedded, keys, statistics)
        first = next(outputs)
        if self.config.topology == "serial":
            [first] = deque(outputs, maxlen=1)
            outputs = repeat(first)
        elif self.config.cross_source == "layer_input":
            outputs = chain([first], outputs)
        x = self._decoder_start(first, embedded)
        for layer in self.decoder:
            output = next(outputs)
            x, masks = layer(x, output, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
        return self._transformed(x, statistics, embedded, output, keys)

    def _side_by_side(self, embedded: Embedded, keys: Tensor | None) -> Transformed:
        """The same, decoder layer l together with the encoder layer that depends on nothing of it (A13)."""
        encoded, source, statistics = embedded.tokens, embedded.mask_source, Statistics()
        x = self._decoder_start(encoded, embedded)
        for layer in self.encoder[: self._lead]:
            encoded, masks = layer(encoded, keys, source, embedded.visible)
            statistics |= masks
        for pair in self.pairs:
            encoded, x, masks = pair(encoded, x, keys, source, embedded.visible)
            statistics |= masks
        x, masks = self.decoder[-1](x, encoded, keys, source, embedded.visible)
        return self._transformed(x, statistics | masks, embedded, encoded, keys)

    def _decoder_start(self, first: Tensor, embedded: Embedded) -> Tensor:
        x: Tensor = self.decoder_input(self.decoder_input_norm(first))
        if self.config.add_next_position:
            assert embedded.next_positions is not None
            x = x + embedded.next_positions
        return x

    def _transformed(
        self, x: Tensor, statistics: Statistics, embedded: Embedded, output: Tensor, keys: Tensor | None
    ) -> Transformed:
        if keys is None or self.encoder_loss is None:
            return Transformed(x, statistics, {})
        return Transformed(x, statistics, self.encoder_loss(embedded.tokens, output, embedded.visible))

    def _encode(self, embedded: Embedded, keys: Tensor | None, statistics: Statistics) -> Iterator[Tensor]:
        """The embedded tokens, then the output of each encoder layer, computed when it is asked for."""
        x = embedded.tokens
        yield x
        for layer in self.encoder:
            x, masks = layer(x, keys, embedded.mask_source, embedded.visible)
            statistics |= masks
            yield x
