"""What a query may see of the keys: all up to its own position, everything, and no other document than its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention.rule import dense, in_blocks, rule
from model.batch import IGNORE, Batch
from model.config.model_config import ModelConfig


class Visible(NamedTuple):
    """What the attentions of a stream may see."""

    causal: bool = True
    """Keys up to the query's own position; else all. Not read where there is a `mask`."""
    mask: Tensor | BlockMask | None = None
    """[B, 1, T, T] bool, True where a query sees a key, or the same for FlexAttention."""
    positions: Tensor | None = None
    """[B, T] int64, place of each token in its document; its place in the row unless given."""
    aligned: bool = True
    """Queries and keys stand at the same positions; else their distance means nothing."""
    padding: Tensor | None = None
    """[B, T] bool, True where a position counts for nothing, in a norm over the batch or in what is told of positions;
    nowhere unless given."""
    num_tokens: Tensor | None = None
    """0-d: what sums over positions are divided by where there is padding; the number of the others unless given."""


CAUSAL = Visible()
EVERYTHING = Visible(causal=False)
ACROSS = Visible(causal=False, aligned=False)
"""All of another sequence."""


def visible_in(batch: Batch, config: ModelConfig) -> Visible:
    """What self attention over the inputs of a batch may see.

    On CUDA in blocks for FlexAttention, of which those without a visible key are never computed; elsewhere, and where
    its kernels cannot be had (`ModelConfig.sees_in_blocks`), a dense mask.
    """
    if batch.segment_ids is None and batch.prefix_lengths is None:
        return _counting(CAUSAL._replace(causal=config.causal, positions=batch.position_ids), batch)
    blocks = batch.input_ids.is_cuda and config.sees_in_blocks
    mask = block_mask(batch, config.causal) if blocks else dense_mask(batch, config.causal)
    return _counting(Visible(mask=mask, positions=batch.position_ids), batch)


def _counting(visible: Visible, batch: Batch) -> Visible:
    return visible._replace(padding=batch.padding, num_tokens=None if batch.counts is None else batch.counts.tokens)


def visible_target(batch: Batch) -> Visible:
    """What the decoder of two sequences may see of what it has written."""
    if batch.padding is None:
        return CAUSAL
    count = None if batch.counts is None else batch.counts.labels
    return CAUSAL._replace(padding=batch.labels == IGNORE, num_tokens=count)


def visible_source(batch: Batch) -> tuple[Visible, Visible]:
    """What the encoder of two sequences may see of its inputs, and the decoder of them: all but padding."""
    if batch.segment_ids is None:
        return _counting(EVERYTHING, batch), ACROSS
    keys = (batch.segment_ids == 0)[:, None, None]
    assert batch.decoder_input_ids is not None
    across = keys.expand(-1, 1, batch.decoder_input_ids.shape[1], -1)
    within = EVERYTHING._replace(mask=dense_mask(batch, causal=False))
    return _counting(within, batch), ACROSS._replace(mask=across)


def dense_mask(batch: Batch, causal: bool) -> Tensor:
    """[B, 1, T, T] bool: True where a query sees a key."""
    rows, length = batch.input_ids.shape
    places = torch.arange(length, device=batch.input_ids.device)
    return dense(rule(causal, batch.segment_ids, batch.prefix_lengths), rows, places, places)


def block_mask(batch: Batch, causal: bool) -> BlockMask:
    """The same, for FlexAttention."""
    rows, length = batch.input_ids.shape
    return in_blocks(rule(causal, batch.segment_ids, batch.prefix_lengths), rows, length, batch.input_ids.device)
