"""What the parts of a model cost: parameters, FLOPs of a forward pass, bytes kept for the backward pass. Free of torch.

An architecture's `costs` names its parts (`model/architectures/NAME/spec.py`); every total is a sum over them.

**FLOPs.** Matrix products only, 2 for a multiplication with addition, and attention over the full T x T square, of
which a causal model needs half (the convention of PaLM, arXiv:2204.02311, appendix B). With width C, T tokens,
vocabulary V, feed forward of width F (three maps for SwiGLU), and g heads of queries to one of keys, for each token:

    attention                  2 (2 + 2 / g) C² + 4 T C
    cross attention            4 C², of what is read 4 C² / g, and 4 S C over S read tokens
    feed forward               2 (2 or 3) F C; with G block gates 2 G C more, and of F only what is open is executed
    learned dropout, a mask    6 C² + 4 T C; C² of a map of low rank, nothing of the element alone (docs/model.md B1)
    its shared source          8 C² + 4 T C
    head                       2 V C

**Saved bytes.** Tensors as torch saves them on a CPU, each storage once. With H heads and e bytes an element (2 in
bf16, else 4), a token of a layer with the defaults keeps

    norm                its input C e, 2 statistics e
    self attention      its input C e, queries, keys and values 3 C e, sums 4 H, result C e
    cross attention     the same with its own heads, and of the encoder's norm C e and 2 e
    feed forward        its input C e, 2 F e; with G block gates F e + G (e + 5) more, of `cosine` F e + G (e + 8)
    learned dropout     what is masked C e, its attention 4 C e + 4 H, the mask C e, and in fp32 twice 4 C: the angle,
                        and the slope of its entropy

so that one of a decoder-only model without masks keeps (8 C + 2 F) e + 4 H + 4 e. Korthikanti et al. 2022
(arXiv:2205.05198, section 4) count alike. Estimates are: the encoder's loss; hard-concrete gates; gated blocks where
open ones alone are computed, which keep less than counted here. RMSNorm on CUDA is one kernel, which keeps less than
counted here; what `engine.compile` does is not in it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

from model.config.mask_config import Site
from model.config.model_config import ModelConfig
from model.config.pattern_config import FULL, Patterns, keys_seen
from model.config.transformer import TransformerConfig, TwoStreamConfig
from model.costs.attention_bytes import attention_bytes, in_layers
from model.costs.mixers import mixed
from model.layers.chunks import chunk_tokens

_FP32 = 4


class Part(NamedTuple):
    """Costs of one part of a model."""

    name: str = ""
    """As `duet model params` and `flops` print it; parts of a name are added up."""
    parameters: int = 0
    flops: int = 0
    """Of a forward pass over a sample, in training."""
    saved: int = 0
    """Bytes kept for the backward pass of a micro-batch."""
    gated: int = 0
    """Of the FLOPs, those of blocks that have a gate: what is left out were all of them closed."""
    closed: int = 0
    """Of these, what is left out at the density that is configured."""
    mixed: int = 0
    """Channels of a token that attention takes and gives: queries, keys, values and result."""
    forward_only: int = 0
    """Of the FLOPs, those that no gradient goes through: a backward pass has none for them."""


class Costs(NamedTuple):
    """Costs of a model, by part."""

    outside: list[Part]
    """What is in no layer."""
    layers: list[tuple[int, list[Part]]]
    """So many layers of these parts."""
    layer_inputs: int
    """Bytes of what layers hand on: all that stays of them with activation checkpointing."""

    def parts(self) -> Iterator[tuple[int, Part]]:
        """Every part, and how often it is there."""
        yield from ((1, part) for part in self.outside)
        yield from chain.from_iterable(((count, part) for part in parts) for count, parts in self.layers)


@runtime_checkable
class Priced(Protocol):
    """A configuration that says what its model costs."""

    def costs(self, shape: "Shape") -> Costs:
        """At a shape whose `config` it is."""
        ...


@dataclass(frozen=True)
class Shape:
    """What is computed of a model: `rows` samples of `inputs` tokens read and `targets` tokens predicted."""

    config: ModelConfig
    inputs: int
    targets: int
    rows: int = 1
    size: int = _FP32
    """Bytes of an element of weights and activations, 2 or 4."""
    dense_mask: bool = False
    """Attention gets a mask [B, 1, T, T] (`model.attention.visibility`), not blocks and not only the order."""
    in_blocks: bool = False
    """What patterns let be seen goes to FlexAttention, not to a form of our own (`Pattern.form`)."""
    patterns: Patterns = (FULL,)
    """Of the layer; before the layers, of the first one."""
    asking: int = 0
    """Of the tokens of a layer, those that only ask: attention has no keys of them (`model.attention.visibility`)."""
    layer: int = 0
    """Its number in its stream, where blocks were taken out of single feed forwards; else 0."""
    sharing: int = 1
    """Ranks that hold an equal part of the positions of each row; bytes are those of one of them."""
    table_stays: bool = False
    """The table that is the head is not trained."""

    def by_pattern(self, layers: int) -> list[tuple[int, "Shape"]]:
        """The shapes of a stream's layers, and so many layers of each."""
        config = self.transformer
        alike = not config.shrunk
        numbered = ((layer, config.pattern.of_layer(layer, config.context)) for layer in range(layers))
        found = Counter((0 if alike else layer, patterns) for layer, patterns in numbered)
        return [(count, replace(self, layer=layer, patterns=patterns)) for (layer, patterns), count in found.items()]

    def inner(self, site: Site) -> int:
        """Channels of the heads that an attention of the layer has."""
        config = self.transformer
        return config.width * config.heads_at(site, self.layer) // config.heads_of(site)

    def of_width(self, width: int) -> "Shape":
        """The same with other vectors."""
        return replace(self, config=self.config.model_copy(update={"width": width}))

    def scores(self, tokens: int, causal: bool) -> int:
        """FLOPs of q k^T and of the weights times v, in self attention."""
        return round(4 * tokens * keys_seen(self.patterns, tokens - self.asking, causal) * self.config.width)

    @property
    def transformer(self) -> TransformerConfig:
        """The configuration, of a model that has layers of attention."""
        assert isinstance(self.config, TransformerConfig)
        return self.config

    @property
    def post(self) -> bool:
        """Norms come after the additions."""
        return self.config.norm_position == "post"

    @property
    def norm_keeps_input(self) -> bool:
        """RMSNorm in 16 bits keeps a copy in fp32 instead."""
        return self.size == _FP32 or self.config.norm != "rmsnorm"

    def vectors(self, tokens: int, size: int | None = None) -> int:
        """Bytes of [B, T, C], `size` an element."""
        return self.held(tokens) * self.config.width * (size or self.size)

    def held(self, tokens: int) -> int:
        """Positions of a rank, of so many in each row."""
        return self.rows * tokens // self.sharing


def linear_weights(config: ModelConfig, inputs: int, outputs: int) -> int:
    """Parameters of a linear map."""
    return (inputs + config.bias) * outputs


def norm_weights(config: ModelConfig) -> int:
    """Parameters of a norm of the stream."""
    return config.width if config.norm == "rmsnorm" else config.width * (1 + config.bias)


def linear(shape: Shape, name: str, tokens: int) -> Part:
    """A map C -> C; what it reads is kept by what comes before."""
    width = shape.config.width
    return Part(name, linear_weights(shape.config, width, width), tokens * 2 * width**2)


def norm(shape: Shape, tokens: int, *, both_ways: bool = False, inputs: bool = True) -> Part:
    """With its input, unless something else keeps that, too. `both_ways`: BatchNorm may stand there."""
    exact = shape.size == _FP32
    weights = norm_weights(shape.config)
    if shape.config.norm == "batchnorm" and both_ways:
        return Part("norms", weights, saved=shape.vectors(tokens, _FP32) * (3 if inputs or not exact else 2))
    if shape.config.norm == "rmsnorm":
        own = shape.held(tokens) * _FP32 + shape.vectors(tokens, _FP32) * (1 if exact else 2)
    else:
        own = 2 * shape.held(tokens) * shape.size
    kept = shape.vectors(tokens) if inputs and shape.norm_keeps_input else 0
    return Part("norms", weights, saved=own + kept)


def head(shape: Shape) -> list[Part]:
    """The table as the head; its loss is counted by `loss_bytes`."""
    config = shape.config
    assert config.vocab_size is not None
    flops = shape.targets * 2 * config.vocab_size * config.width
    return [Part("token table", config.vocab_size * config.width, flops)]


def loss_bytes(shape: Shape) -> tuple[int, int]:
    """What the loss keeps, and what is there beside it for a moment (model/layers/chunked_loss.py)."""
    config = shape.config
    assert config.vocab_size is not None
    count, width = shape.held(shape.targets), config.width
    vocabulary = config.vocab_size if config.label_head is None else config.label_head.outputs
    chunk = chunk_tokens(count, vocabulary, width)
    table = 0 if shape.table_stays else vocabulary * width
    kept = shape.vectors(shape.targets) + table * (shape.size if chunk == count else _FP32)
    # In 16 bits there are two of the logits, and each chunk's gradient of the table is a tensor of its own.
    low = shape.size if shape.size < _FP32 else 0
    return kept, chunk * vocabulary * (_FP32 + low) + (table * low if chunk < count else 0)


def embedded(shape: Shape, tokens: int, *, causal: bool | None = None, again: bool = False) -> list[Part]:
    """From ids to the first layer of a stream, which keeps its own input. `again`: tables were counted already."""
    config = shape.config
    causal = config.causal if causal is None else causal
    parts = [Part(saved=shape.held(tokens - shape.asking) * 8)]
    if config.positions == "learned":
        rows = 0 if again else config.context + config.uses_next_position
        apart = config.document_mask or shape.sharing > 1 or shape.asking
        places = shape.held(tokens) * (1 + config.uses_next_position) if apart else tokens + config.uses_next_position
        saved = 8 * (shape.held(tokens) if shape.asking else places)
        parts.append(Part("position table", rows * config.width, saved=saved))
    if not isinstance(config, TransformerConfig):
        return parts
    if not again and (slots := config.scores.shared_slot_weights(config.context)):
        parts.append(Part("slots", slots))
    if config.shares_mask_source:
        square = 2 * config.width**2
        flops = tokens * 4 * square + shape.scores(tokens, causal)
        saved = attention_bytes(shape, tokens, tokens, config.heads, causal=causal) + shape.vectors(tokens)
        if "embed" not in config.dropout_sites and (config.dropout or not (shape.norm_keeps_input or shape.post)):
            saved += shape.vectors(tokens)
        parts.append(Part("mask source", 0 if again else 4 * config.width**2, flops, saved, mixed=4 * config.width))
    return [*parts, *site(shape, "embed", tokens, causal)]


def end(shape: Shape) -> list[Part]:
    """The last norm; where norms come after the additions, the last layer's output is normed already."""
    only_encoder = not shape.config.causal and not shape.config.traits.two_sequences
    return [] if shape.post else [norm(shape, shape.targets, both_ways=only_encoder)]


def last_output(shape: Shape, tokens: int) -> list[Part]:
    """The last encoder layer's output, which no further layer of its stream keeps."""
    return [Part(saved=shape.vectors(tokens))] if shape.norm_keeps_input or shape.post else []


def one_stream(shape: Shape, tokens: int, sites: tuple[Site, Site], *, stream: str = "layers") -> list[Part]:
    """A layer of self attention and feed forward; `sites` of the two, `stream` as its parts are called."""
    config = shape.transformer
    norms = [norm(shape, tokens, both_ways=not config.causal), Part(saved=shape.vectors(tokens))] * 2
    own = self_attention(shape, tokens, f"{stream}: attention", sites[0], causal=config.causal)
    masks = chain.from_iterable(site(shape, name, tokens, config.causal) for name in sites)
    return [*norms, own, feed_forward(shape, tokens, f"{stream}: feed forward", sites[1]), *masks]


def cross_layer(
    shape: Shape,
    tokens: int,
    read: int,
    *,
    aligned: bool = True,
    causal: bool = True,
    stream: str = "decoder",
    sites: tuple[Site, Site, Site] = ("dec_sa", "cross", "dec_ff"),
) -> list[Part]:
    """A decoder layer, without its input from the encoder; `aligned`: both streams stand at the same positions.

    `sites` of self attention, cross attention and feed forward; `stream` as its parts are called.
    """
    config = shape.transformer
    assert isinstance(config, TwoStreamConfig)
    parts = [norm(shape, tokens), Part(saved=shape.vectors(tokens))] * 3
    if not shape.post:
        parts += [norm(shape, read, inputs=False), Part(saved=shape.vectors(read))]
    parts.append(self_attention(shape, tokens, f"{stream}: attention", sites[0], causal=causal))
    width, heads, inner = config.width, config.heads_at(sites[1], shape.layer), shape.inner(sites[1])
    narrow, keys = shape.of_width(inner), inner // config.queries_per_kv_head
    weights = linear_weights(config, width, inner) + linear_weights(config, width, 2 * keys)
    weights += linear_weights(config, inner, width)
    weights += config.weights.learned * config.weights.shapes(aligned=aligned) * heads
    flops = tokens * 4 * width * inner + read * 4 * width * keys
    flops += narrow.scores(tokens, causal=True) if aligned else 4 * read * tokens * inner
    saved = attention_bytes(
        narrow,
        tokens,
        read,
        heads,
        causal=config.causal,
        cross=True,
        aligned=aligned,
        **in_layers(config),
    )
    parts.append(Part(f"{stream}: cross attention", weights, flops, saved, mixed=2 * (width + keys)))
    parts.append(feed_forward(shape, tokens, f"{stream}: feed forward", sites[-1]))
    return [*parts, *chain.from_iterable(site(shape, name, tokens, causal=causal) for name in sites)]


def self_attention(shape: Shape, tokens: int, name: str, site: Site, *, causal: bool) -> Part:
    """With its maps; of the heads that are there in the shape's layer."""
    config = shape.transformer
    width, heads, inner = config.width, config.heads_at(site, shape.layer), shape.inner(site)
    mapped = (sum(config.score_channels) + width // config.queries_per_kv_head) * heads // config.heads
    weights = linear_weights(config, width, mapped) + linear_weights(config, inner, width)
    weights += config.weights.learned * heads
    flops = tokens * 2 * width * (mapped + inner)
    if (other := mixed(shape, config, tokens, site, causal=causal)) is not None:
        flops, once = flops + other.flops, other.forward_only
        return Part(name, weights + other.parameters, flops, other.saved, forward_only=once)
    narrow = shape.of_width(inner)
    flops += narrow.scores(tokens, causal)
    saved = attention_bytes(narrow, tokens, tokens, heads, causal=causal, **in_layers(config))
    keys = width // config.queries_per_kv_head * heads // config.heads
    return Part(name, weights, flops, saved, mixed=2 * (inner + keys))


def feed_forward(shape: Shape, tokens: int, name: str, site: Site | None = None) -> Part:
    """C -> F -> C; where its `site` has block gates, of the blocks that are there in the shape's layer."""
    config = shape.transformer
    width, outputs, gates = config.width, 2 if config.ff == "swiglu" else 1, config.block_gates
    gated = site is not None and site in config.gate_sites
    blocks = config.blocks_at(site, shape.layer) if site and gated else 1
    hidden = blocks * config.block_width if gated else config.hidden_width
    written = config.channels_left.get(f"{site}/{shape.layer:02d}", width)
    weights = linear_weights(config, width, outputs * hidden) + linear_weights(config, hidden, written)
    flops, positions = tokens * 2 * hidden * (outputs * width + written), shape.held(tokens)
    saved = positions * 2 * outputs * hidden * shape.size
    saved += positions * written * shape.size if written < width else 0
    if not gated:
        return Part(name, weights, flops, saved)
    closed = round(flops * max(0.0, 1.0 - gates.density * gates.blocks / blocks))
    in_fp32 = 5 if gates.kind == "top" else 4 * 2
    saved += positions * (hidden * shape.size + blocks * (in_fp32 + shape.size))
    if shape.size < _FP32:  # a copy of what is read, and one of the gates' map
        saved += shape.vectors(tokens, _FP32) + blocks * width * _FP32
    gate = tokens * 2 * blocks * width
    return Part(name, weights + blocks * (width + 1), flops + gate, saved, gated=flops, closed=closed)


def site(shape: Shape, name: Site, tokens: int, causal: bool) -> list[Part]:
    """A mask with what it is computed from, and ordinary dropout."""
    config, exact = shape.transformer, shape.size == _FP32
    width = config.width
    parts = [Part(saved=shape.vectors(tokens))] if config.dropout else []
    if name in config.l0_sites:
        return [*parts, Part("masks", width, saved=shape.vectors(tokens))]
    if name not in config.dropout_sites:
        return parts
    masks = config.learned_dropout
    saved = shape.vectors(tokens)  # what is masked
    mixed = 4 * width
    if masks.source == "elementwise":
        weights, flops, mixed = 2 * width, 0, 0
        saved += 0 if exact else shape.vectors(tokens, _FP32)
    elif masks.source == "low_rank":
        weights, flops, mixed = (2 * config.mask_rank + 1) * width, tokens * 4 * config.mask_rank * width, 0
        saved += shape.vectors(tokens) * config.mask_rank // width
    else:
        weights, flops = (3 * width + 1) * width, tokens * 6 * width**2 + shape.scores(tokens, causal)
        saved += attention_bytes(shape, tokens, tokens, config.heads, causal=causal, read=False)
    squared, rounding = masks.l1.kind == "squared", masks.rounding
    in_fp32 = 2 + squared + (rounding == "sigmoid")
    # What is used is one of them already.
    used = 0 if exact and (rounding == "sigmoid" or (rounding == "none" and squared)) else 1
    saved += in_fp32 * shape.vectors(tokens, _FP32) + used * shape.vectors(tokens)
    return [*parts, Part("masks", weights, flops, saved, mixed=mixed)]
