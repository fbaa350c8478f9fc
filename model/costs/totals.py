"""Sums over what the parts of a model cost. Free of torch: login nodes count, too."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from data_pipeline.errors import ConfigError
from model.config.head_config import NO_LABELS
from model.config.model_config import NO_VOCABULARY, ModelConfig
from model.costs.parts import Costs, Part, Priced, Shape, loss_bytes


class CostsUnknown(ConfigError):
    """An architecture that is not ours does not say what it costs, and it cannot be measured here."""


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


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """The parameters of each part.

    The token table, which is also the head, counts once. Norms, and masks with their gates, are one part each wherever
    they stand.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    found: Counter[str] = Counter()
    for count, part in costs(config).parts():
        found[part.name] += count * part.parameters
    return {name: number for name, number in found.items() if number}


def num_parameters(config: ModelConfig) -> int:
    """Those of the model that `registry.build` makes. Raises as `parameters_by_part`."""
    return sum(parameters_by_part(config).values())


def sample_flops_by_part(config: ModelConfig, pairs: bool = False) -> dict[str, int]:
    """FLOPs of a forward pass over a sample of a full context (`model.costs.parts`), those that cost any.

    An encoder-decoder of two sequences reads S tokens and predicts U of them (`ModelConfig.lengths`); of `pairs` both
    are a full context.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    found: Counter[str] = Counter()
    for count, part in costs(config, pairs=pairs).parts():
        found[part.name] += count * part.flops
    return {name: number for name, number in found.items() if number}


def forward_flops(config: ModelConfig, pairs: bool = False) -> int:
    """Of a sample: the sum of `sample_flops_by_part`."""
    return sum(sample_flops_by_part(config, pairs).values())


def forward_only_flops(config: ModelConfig, pairs: bool = False) -> int:
    """Of a sample's `forward_flops`, those that have no backward pass."""
    return sum(count * part.forward_only for count, part in costs(config, pairs=pairs).parts())


def gated_flops(config: ModelConfig, pairs: bool = False) -> int:
    """Of a sample's `forward_flops`, those of blocks that have a gate."""
    return sum(count * part.gated for count, part in costs(config, pairs=pairs).parts())


def executed_flops(config: ModelConfig, pairs: bool = False) -> int:
    """`forward_flops` without those of closed blocks, at the density that is configured."""
    return forward_flops(config, pairs) - sum(count * part.closed for count, part in costs(config, pairs=pairs).parts())


def mixed_channels(config: ModelConfig) -> int:
    """Channels of a token that attentions take and give, all of them: what ranks that share rows exchange."""
    return sum(count * part.mixed for count, part in costs(config).parts())


def activations(
    config: ModelConfig,
    rows: int,
    size: int,
    *,
    sharing: int = 1,
    pairs: bool = False,
    dense_mask: bool = False,
    in_blocks: bool = False,
    table_stays: bool = False,
) -> Activations:
    """Count for a micro-batch of `rows` samples.

    Args:
        size: bytes of an element of weights and activations, 2 or 4.
        sharing: ranks that share each sample; bytes are those of one of them.
        pairs: the objective is `pairs`: an encoder-decoder of two sequences reads and writes a full context each.
        dense_mask: attention gets a mask [B, 1, T, T] (`model.attention.visibility`), not blocks and not only the
            order.
        in_blocks: patterns go to FlexAttention.
        table_stays: the table that is the head is not trained; the layers are counted as if all of them were.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    shape = shape_of(config, rows, size, pairs=pairs, dense_mask=dense_mask, in_blocks=in_blocks)
    shape = replace(shape, sharing=sharing, table_stays=table_stays)
    found = _priced(config).costs(shape)
    of_layer = [(count, _saved(parts)) for count, parts in found.layers]
    loss, logits = loss_bytes(shape)
    return Activations(
        layers=sum(count * saved for count, saved in of_layer),
        layer_inputs=found.layer_inputs,
        largest_layer=max((saved for _, saved in of_layer), default=0),
        outside=_saved(found.outside),
        loss=loss,
        logits=logits,
    )


def costs(config: ModelConfig, *, pairs: bool = False) -> Costs:
    """What the architecture says of itself, for one sample in fp32. Raises ConfigError without a vocabulary."""
    return _priced(config).costs(shape_of(config, pairs=pairs))


def shape_of(
    config: ModelConfig,
    rows: int = 1,
    size: int = 4,
    *,
    pairs: bool = False,
    dense_mask: bool = False,
    in_blocks: bool = False,
) -> Shape:
    """The shape of a micro-batch; see `activations`. Raises ConfigError without a vocabulary."""
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    if config.label_head is not None and not config.label_head.outputs:
        raise ConfigError(NO_LABELS)
    two_full = pairs and config.traits.two_sequences
    inputs, targets = (config.context, config.context) if two_full else config.lengths
    return Shape(config, inputs, targets, rows, size, dense_mask, in_blocks, config.patterns[0])


def _priced(config: ModelConfig) -> Priced:
    assert isinstance(config, Priced)
    return config


def _saved(parts: list[Part]) -> int:
    return sum(part.saved for part in parts)
