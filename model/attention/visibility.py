"""What a query may see of the keys: all up to its own position, everything, and no other document than its own."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.forms import Mask, mask_of
from model.attention.rule import Rows
from model.batch import IGNORE, Batch, Share
from model.config.model_config import ModelConfig


class Visible(NamedTuple):
    """What the attentions of a stream may see."""

    causal: bool = True
    """Keys up to the query's own position; else all. Where there is a `mask`, it says so, too."""
    mask: Mask = None
    """[B, 1, T, T] bool, True where a query sees a key, or a form of it; None for all. To layers with the first of the
    configuration's patterns."""
    others: tuple[Mask, ...] = ()
    """The same to layers with each further pattern."""
    positions: Tensor | None = None
    """[B, T] int64, place of each token in its document; its place in the row unless given."""
    key_positions: Tensor | None = None
    """[B, S] int64, the same of the keys, where these are not those of the queries."""
    aligned: bool = True
    """Queries and keys stand at the same positions; else their distance means nothing."""
    padding: Tensor | None = None
    """[B, T] bool, True where a position counts for nothing, in a norm over the batch or in what is told of positions;
    nowhere unless given."""
    asking: int = 0
    """So many positions at the end only ask: none sees them, themselves included, and no cache keeps them. The last one
    sees what the last of the others sees, and so on backwards."""
    num_tokens: Tensor | None = None
    """0-d: what sums over positions are divided by where there is padding; the number of the others unless given."""

    share: Share | None = None
    """Where ranks share the rows: the masks are of whole rows, all else here is of this rank's positions."""

    @property
    def first(self) -> int:
        """Column of the first position in its row."""
        return 0 if self.share is None else self.share.first

    def of(self, pattern: int) -> "Visible":
        """To a layer with this one of the configuration's patterns."""
        return self._replace(mask=self.others[pattern - 1], others=()) if self.others and pattern else self


CAUSAL = Visible()
ACROSS = Visible(causal=False, aligned=False)
"""All of another sequence."""


def visible_in(input_ids: Tensor, batch: Batch | None, config: ModelConfig) -> Visible:
    """What self attention over inputs [B, T] may see, which are all of one text unless a batch says otherwise.

    On CUDA in blocks for FlexAttention, of which those without a visible key are never computed; elsewhere, and where
    its kernels cannot be had (`ModelConfig.sees_in_blocks`), in the form that is fastest (`Pattern.form`).
    """
    rows = Rows(input_ids.shape, input_ids.device, config.causal)
    if batch is None:
        return _seen(rows, config)
    prefixes = None if config.reads_prompt else batch.prefix_lengths
    if batch.share is None:
        rows = replace(rows, segments=batch.segment_ids, positions=batch.position_ids, prefixes=prefixes)
        return _counting(_seen(rows, config), batch)
    whole = batch.share
    rows = Rows(whole.shape, rows.device, rows.causal, whole.segment_ids, whole.position_ids, prefixes)
    return _counting(_seen(rows, config)._replace(positions=batch.position_ids, share=whole), batch)


def _seen(rows: Rows, config: ModelConfig) -> Visible:
    in_blocks = rows.device.type == "cuda" and config.sees_in_blocks
    masks = [mask_of(rows, patterns, in_blocks=in_blocks, dense=config.needs_weights) for patterns in config.patterns]
    return Visible(rows.causal and rows.prefixes is None, masks[0], tuple(masks[1:]), rows.positions)


def _counting(visible: Visible, batch: Batch) -> Visible:
    return visible._replace(padding=batch.padding, num_tokens=None if batch.counts is None else batch.counts.tokens)


def visible_target(batch: Batch, config: ModelConfig) -> Visible:
    """What the decoder of two sequences may see of what it has written."""
    assert batch.decoder_input_ids is not None
    visible = _seen(Rows(batch.decoder_input_ids.shape, batch.decoder_input_ids.device), config)
    if batch.padding is None:
        return visible
    count = None if batch.counts is None else batch.counts.labels
    return visible._replace(padding=batch.labels == IGNORE, num_tokens=count)


def visible_draft(batch: Batch, config: ModelConfig) -> Visible:
    """What a decoder that writes all places at once may see of them: all that hold a label."""
    rows = Rows(batch.labels.shape, batch.labels.device, False)
    if batch.padding is None:
        return _seen(rows, config)
    padding = batch.labels == IGNORE
    visible = _seen(replace(rows, segments=padding.int()), config)
    return visible._replace(padding=padding, num_tokens=None if batch.counts is None else batch.counts.labels)


def visible_both_ways(
    shape: torch.Size, device: torch.device, config: ModelConfig, padding: Tensor | None = None
) -> Visible:
    """What self attention over rows of one text each may see that looks both ways: all but padding [B, T] bool."""
    if padding is None:
        return _seen(Rows(shape, device, False), config)
    return _seen(Rows(shape, device, False, padding.int()), config)._replace(padding=padding)


def visible_source(batch: Batch, config: ModelConfig) -> tuple[Visible, Visible]:
    """What the encoder of two sequences may see of its inputs, and the decoder of them: all but padding."""
    ids, segments = batch.input_ids, batch.segment_ids
    within = _counting(_seen(Rows(ids.shape, ids.device, False, segments), config), batch)
    if segments is None:
        return within, ACROSS
    assert batch.decoder_input_ids is not None
    keys = (segments == 0)[:, None, None]
    return within, ACROSS._replace(mask=keys.expand(-1, 1, batch.decoder_input_ids.shape[1], -1))
