"""What goes into every architecture and what comes out."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""A label that counts for nothing."""


class Counts(NamedTuple):
    """What sums over a micro-batch are divided by, to become means. 0-d, above 0."""

    labels: Tensor
    """Of all that is said of labels, and of the positions of a decoder that reads padded targets."""
    tokens: Tensor
    """Of all that is said of the inputs' positions, where some are padding."""


class RowExchange(Protocol):
    """How ranks that share rows of tokens give each other what attention needs (docs/engine.md, sequence parallelism).

    Both ways carry gradients, and all ranks that share rows go them as often and in the same order.
    """

    size: int
    """Ranks that share each row."""
    rank: int
    """Which of them this one is, from 0."""

    def heads(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """[B, T / size, H, d] of each, the rank's positions -> [B, T, H / size, d], its heads; H and d may differ."""
        ...

    def positions(self, x: Tensor) -> Tensor:
        """The way back: [B, T, H / size, d] -> [B, T / size, H, d]."""
        ...


@dataclass(frozen=True)
class Share:
    """Which positions of its rows a batch holds, where ranks share them, and what attention must know of the others."""

    exchange: RowExchange
    first: int
    """Column, in the whole rows, of the first position."""
    shape: torch.Size
    """(B, T) of the whole rows."""
    segment_ids: Tensor | None
    """[B, T], as below, of the whole rows."""
    position_ids: Tensor | None
    """[B, T], as below, of the whole rows."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch. B sequences of T tokens."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: the token to predict at each input, for a causal model the next one, or IGNORE. Of a model that
    says labels of texts what `LabelModel` says."""
    samples: Tensor
    """[B] int64: global position of each sequence in the data order; keys the noise."""
    step: Tensor
    """0-d int64: optimizer step, from 1; keys the noise and the penalty schedules."""
    seed: int
    """Of the run; keys the noise."""
    segment_ids: Tensor | None = None
    """[B, T]: number of each token's document in its row, which attention does not leave; padding has a number
    of its own. None: a row is one document. The decoder of an `encoder_decoder` reads
    segment 0 alone."""
    position_ids: Tensor | None = None
    """[B, T] int64: place of each token in its document; its place in the row unless given."""
    prefix_lengths: Tensor | None = None
    """[B] int64: so many tokens at the start of each row are seen by all of it."""
    query_positions: Tensor | None = None
    """[B, n] int64: in a `two_stream`, the place of the token that each label is; that behind each input unless given.
    `labels` are [B, n] then, the last n of the order in which the inputs come, and `position_ids` are their places."""
    decoder_input_ids: Tensor | None = None
    """[B, U] int64: what the decoder of an `encoder_decoder` reads, U <= N; `labels` are [B, U] then."""
    padding: Tensor | None = None
    """[B, T] bool: True where a position of the inputs holds no token and counts for nothing; nowhere unless given.
    The decoder of an `encoder_decoder` then has padding where the labels are IGNORE."""
    counts: Counts | None = None
    """The batch's own numbers unless given. Where the micro-batches of a step hold unequal numbers, the means of these:
    then the mean over the micro-batches is the mean over all labels, or tokens, of the step."""

    share: Share | None = None
    """Where ranks share these rows: all that is [B, T] here is of one rank's positions, which are a micro-batch of the
    step by themselves; `position_ids` are given."""

    def shared(self, exchange: RowExchange) -> "Batch":
        """What one of the ranks that share these rows holds: of each as many positions as the others, side by side."""
        rows, length = self.input_ids.shape
        held = length // exchange.size
        first = exchange.rank * held
        columns = torch.arange(length, device=self.input_ids.device).expand(rows, -1)
        tensors = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "segment_ids": self.segment_ids,
            "position_ids": columns if self.position_ids is None else self.position_ids,
            "padding": self.padding,
        }
        share = Share(exchange, first, self.input_ids.shape, self.segment_ids, self.position_ids)
        cut = {name: None if x is None else x[:, first : first + held].contiguous() for name, x in tensors.items()}
        return replace(self, share=share, **cut)  # type: ignore[arg-type]

    def num_labels(self) -> Tensor:
        """Labels that are not IGNORE, 0-d int64."""
        return (self.labels != IGNORE).sum()

    def num_tokens(self) -> Tensor:
        """Positions of the inputs that are not padding, 0-d int64."""
        holds = torch.ones_like(self.input_ids, dtype=torch.bool) if self.padding is None else ~self.padding
        return holds.sum()


class ModelOutput(NamedTuple):
    """Result of a forward pass. A tuple, so that ZeRO-3's hooks find the loss inside."""

    loss: Tensor
    """0-d: the objective, penalties included. Of a step it is the mean over the micro-batches of all ranks."""
    metrics: dict[str, Tensor]
    """Detached tensors by name, of a step the means over the micro-batches of all ranks; 0-d, but for moments, of which
    `telemetry.told` makes numbers. `cross_entropy` (nats, mean over labels that count) is always there."""
    by_token: Tensor | None = None
    """[B, T]: cross entropy of each label in nats, 0 where it is IGNORE; None while gradients are recorded."""
    chosen: Tensor | None = None
    """Of a model that says labels of texts: the likeliest in the place of each label, int64; None while gradients are
    recorded."""
