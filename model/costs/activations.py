"""What a model in training keeps for the backward pass, by arithmetic. Free of torch: login nodes count, too.

Tensors as torch saves them on a CPU, each storage once; tests/model/costs/test_activations.py counts the real ones.
With C channels, F of the feed forward, H heads and e bytes an element (2 in bf16, else 4), a token of a layer with the
defaults keeps

    norm                its input C e, 2 statistics e
    self attention      its input C e, queries, keys and values 3 C e, sums 4 H, result C e
    cross attention     the same with its own heads, and of the encoder's norm C e and 2 e
    feed forward        its input C e, 2 F e
    learned dropout     what is masked C e, its attention 4 C e + 4 H, the mask C e, and in fp32 four times 4 C: the
                        angle, the mask, and what its penalty needs

so that one of a decoder-only model without masks keeps (8 C + 2 F) e + 4 H + 4 e. Korthikanti et al. 2022
(arXiv:2205.05198, section 4) count alike.

Estimates are: `encoder_loss`; hard-concrete gates; `streams=batched`, counted as `plain` with a copy of the weights.
RMSNorm on CUDA is one kernel, which keeps less than counted here; what `engine.compile` does is not in it.
"""

from typing import Any, NamedTuple

from data_pipeline.errors import ConfigError
from model.config.mask_config import Site
from model.config.model_config import NO_VOCABULARY, ModelConfig
from model.layers.chunks import chunk_tokens

_LOGS = {"shannon": 2, "complement": 3, "binary": 5}
"""Tensors of a mask's size that the kinds of its entropy keep, beside the mask itself."""
_FP32 = 4


class Activations(NamedTuple):
    """Bytes of a micro-batch."""

    layers: int
    """Of all layers with their inputs and outputs."""
    layer_inputs: int
    """Of these, all that stays with activation checkpointing."""
    largest_layer: int
    """What activation checkpointing makes once more for the backward pass of a layer."""
    outside: int
    """Of what is in no layer: embedded tokens, last norms, the source of masks, the encoder's loss."""
    loss: int
    """The gradients that the loss keeps, of its input and of the table (model/layers/chunked_loss.py)."""
    logits: int
    """Beside them while the loss is made: a chunk's logits, and a product of the table's size."""

    def kept(self, checkpointing: bool) -> int:
        """At the end of the forward pass, but for the loss."""
        return self.outside + (self.layer_inputs if checkpointing else self.layers)


def activations(
    config: ModelConfig, rows: int, size: int, *, pairs: bool = False, dense_mask: bool = False
) -> Activations:
    """Count for a micro-batch of `rows` samples.

    Args:
        size: bytes of an element of weights and activations, 2 or 4.
        pairs: the objective is `pairs`: an encoder-decoder of two sequences reads and writes a full context each.
        dense_mask: attention gets a mask [B, 1, T, T] (`model.visibility`), not blocks and not only the order.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    two_full = pairs and config.architecture == "encoder_decoder"
    inputs, targets = (config.context, config.context) if two_full else config.lengths
    count = _Count(config, rows, size, dense_mask)
    outside = count.embedded(inputs, config.causal)
    if config.architecture == "encoder_decoder":
        outside += count.embedded(targets, causal=True)
    outside += count.end(targets)
    loss, logits = count.loss(targets)
    if not config.num_decoder_layers:
        layer = count.encoder_layer(inputs, alone=config.architecture == "decoder_only")
        layers, kept = config.layers * layer, config.layers * count.vectors(inputs)
        return Activations(layers, kept, layer, outside, loss, logits)
    encoder, decoder = count.encoder_layer(inputs), count.decoder_layer(targets, inputs)
    layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
    layers += count.vectors(inputs) if count.norm_keeps_input or count.post else 0  # the last encoder layer's output
    kept = (config.num_encoder_layers + 1) * count.vectors(inputs) + config.num_decoder_layers * count.vectors(targets)
    if config.architecture == "parallel_encoder_decoder":
        # Where the first norm does not keep the embedded tokens, the map to the decoder does.
        layers += 0 if count.norm_keeps_input or count.post or config.decoder_input_norm else count.vectors(inputs)
        outside += count.decoder_input_norm(inputs)
    if config.streams == "batched":
        layers += count.stacked_weights()
    return Activations(layers, kept, max(encoder, decoder), outside, loss, logits)


class _Count:
    """Sizes in bytes of what the parts of a model keep."""

    def __init__(self, config: ModelConfig, rows: int, size: int, dense_mask: bool) -> None:
        self._config, self._rows, self._size, self._dense_mask = config, rows, size, dense_mask
        self.post = config.norm_position == "post"
        self.norm_keeps_input = size == _FP32 or config.norm != "rmsnorm"
        """RMSNorm keeps a copy in fp32 instead."""

    def vectors(self, tokens: int, size: int | None = None) -> int:
        """[B, T, C], `size` bytes an element."""
        return self._rows * tokens * self._config.width * (size or self._size)

    def norm(self, tokens: int, both_ways: bool = False, inputs: bool = True) -> int:
        """With its input, unless something else keeps that, too. `both_ways`: BatchNorm may stand there."""
        config, exact = self._config, self._size == _FP32
        if config.norm == "batchnorm" and both_ways:
            return self.vectors(tokens, _FP32) * (3 if inputs or not exact else 2)
        if config.norm == "rmsnorm":
            own = self._rows * tokens * _FP32 + self.vectors(tokens, _FP32) * (1 if exact else 2)
        else:
            own = 2 * self._rows * tokens * self._size
        return own + (self.vectors(tokens) if inputs and self.norm_keeps_input else 0)

    def encoder_layer(self, tokens: int, alone: bool = False) -> int:
        """Also a layer of a model with one stream; `alone`: its sites are called the decoder's."""
        config = self._config
        total = 2 * (self.norm(tokens, both_ways=not config.causal) + self.vectors(tokens))
        total += self._attention(tokens, tokens, config.heads, causal=config.causal, **self._shape())
        total += self._feed_forward(tokens)
        sites: tuple[Site, ...] = ("dec_sa", "dec_ff") if alone else ("enc_sa", "enc_ff")
        return total + sum(self._site(site, tokens, causal=config.causal) for site in sites)

    def decoder_layer(self, tokens: int, read: int) -> int:
        """Without its input from the encoder, `read` tokens."""
        config = self._config
        total = 3 * (self.norm(tokens) + self.vectors(tokens))
        if not self.post:
            total += self.norm(read, inputs=False) + self.vectors(read)
        total += self._attention(tokens, tokens, config.heads, causal=True, **self._shape())
        heads = config.num_cross_heads
        total += self._attention(tokens, read, heads, causal=config.causal, cross=True, **self._shape())
        sites: tuple[Site, ...] = ("dec_sa", "cross", "dec_ff")
        return total + self._feed_forward(tokens) + sum(self._site(site, tokens, causal=True) for site in sites)

    def embedded(self, tokens: int, causal: bool) -> int:
        """From ids to the first layer of a stream, which keeps its own input."""
        config = self._config
        total = self._rows * tokens * 8
        if config.positions == "learned":
            uses_next = config.add_next_position or config.subtract_next_position != "none"
            total += 8 * (self._rows if config.document_mask else 1) * (tokens + uses_next)
        if config.dropout_sites and config.learned_dropout.source == "embed":
            total += self._attention(tokens, tokens, config.heads, causal=causal) + self.vectors(tokens)
            if "embed" not in config.dropout_sites and (config.dropout or not (self.norm_keeps_input or self.post)):
                total += self.vectors(tokens)
        return total + self._site("embed", tokens, causal)

    def decoder_input_norm(self, tokens: int) -> int:
        """Before the map from the embedded tokens to the decoder."""
        if not self._config.decoder_input_norm:
            return 0
        return self.norm(tokens, inputs=False) + self.vectors(tokens)

    def end(self, tokens: int) -> int:
        """Last norms, and the encoder's loss: its two sides in fp32 and their norms, about."""
        config = self._config
        total = 0 if self.post else self.norm(tokens, both_ways=config.architecture == "encoder_only")
        if config.subtract_next_position == "layer_norm":
            total += self.norm(tokens)
        if config.encoder_loss.kind != "none":
            total += 2 * self.vectors(tokens, _FP32)
            total += self.vectors(tokens) if config.encoder_loss.embedding_norm == "average" else 0
        return total

    def loss(self, tokens: int) -> tuple[int, int]:
        """What is kept, and what is there beside it for a moment."""
        assert self._config.vocab_size is not None
        count, vocabulary, width = self._rows * tokens, self._config.vocab_size, self._config.width
        chunk = chunk_tokens(count, vocabulary, width)
        table = vocabulary * width
        kept = self.vectors(tokens) + table * (self._size if chunk == count else _FP32)
        # In 16 bits there are two of the logits, and each chunk's gradient of the table is a tensor of its own.
        low = self._size if self._size < _FP32 else 0
        return kept, chunk * vocabulary * (_FP32 + low) + (table * low if chunk < count else 0)

    def stacked_weights(self) -> int:
        """Copies of the weights of self attention and feed forward of both streams."""
        config = self._config
        width, keys = config.width, config.width // config.queries_per_kv_head
        gates = 2 if config.ff == "swiglu" else 1
        weights = (2 * width + 2 * keys) * width + (gates + 1) * width * config.hidden_width
        return (config.layers - 1) * 2 * weights * self._size

    def _shape(self) -> dict[str, Any]:
        """Of the attentions in layers; those of masks have neither."""
        return {"group": self._config.queries_per_kv_head, "rate": self._config.attention_rate}

    def _feed_forward(self, tokens: int) -> int:
        factor = 4 if self._config.ff == "swiglu" else 2
        return self._rows * tokens * factor * self._config.hidden_width * self._size

    def _attention(
        self,
        queries: int,
        keys: int,
        heads: int,
        *,
        causal: bool,
        group: int = 1,
        rate: float = 0.0,
        cross: bool = False,
    ) -> int:
        """From the projections to the result, which a linear map reads."""
        config, rows, size = self._config, self._rows, self._size
        turned = config.positions == "rotary" and not (cross and config.architecture == "encoder_decoder")
        square = heads * queries * keys
        total = self.vectors(queries)  # the result
        if config.attention == "explicit" or rate:
            total += self.vectors(queries) + 2 * self.vectors(keys)
            # The weights in fp32 and, where that is another type, in 16 bits; with dropout its factors and result.
            low = size < _FP32
            total += rows * square * (_FP32 + low * size + (rate > 0) * (1 if low else 2) * size)
            if self._dense_mask:
                total += rows * queries * keys
            elif causal:
                total += queries * keys
        else:
            total += rows * heads * queries * 4
            total += self.vectors(queries) + 2 * self.vectors(keys)
            # Kernels read views of the projections, or turned and repeated copies beside them.
            if turned and group == 1:
                total += self.vectors(keys) + (0 if cross else self.vectors(queries))
            elif not turned and not cross and group > 1:
                total += 2 * self.vectors(keys) // group
            total += rows * queries * keys * size if self._dense_mask else 0
        if turned:
            total += (rows if config.document_mask else 1) * (queries + keys) * (config.width // heads // 2) * 2 * _FP32
        return total

    def _site(self, site: Site, tokens: int, causal: bool) -> int:
        """A mask with what it is computed from, and ordinary dropout."""
        config, exact = self._config, self._size == _FP32
        total = self.vectors(tokens) if config.dropout else 0
        if site in config.l0_sites:
            return total + self.vectors(tokens)
        if site not in config.dropout_sites:
            return total
        masks = config.learned_dropout
        total += self.vectors(tokens)  # what is masked
        if masks.source == "elementwise":
            total += 0 if exact else self.vectors(tokens, _FP32)
        else:
            total += self._attention(tokens, tokens, config.heads, causal=causal)
            total -= self.vectors(tokens) if config.attention == "explicit" else 0  # no map reads the result
        in_fp32 = 2 + _LOGS[masks.entropy.kind] + (masks.rounding == "sigmoid")
        used = 0 if exact and masks.rounding in ("none", "sigmoid") else 1
        return total + in_fp32 * self.vectors(tokens, _FP32) + used * self.vectors(tokens)
