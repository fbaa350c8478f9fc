"""What goes into every architecture and what comes out."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

IGNORE = -100
"""A label that counts for nothing."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch. B sequences of T tokens."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: the token to predict at each input, for a causal model the next one, or IGNORE."""
    samples: Tensor
    """[B] int64: global position of each sequence in the data order; keys the noise."""
    step: Tensor
    """0-d int64: optimizer step, from 1; keys the noise and the penalty schedules."""
    seed: int
    """Of the run; keys the noise."""
    segment_ids: Tensor | None = None
    """[B, T]: number of each token's document in its row, which attention does not leave; padding has a number
    of its own, and -1 where a norm may ask. None: a row is one document. The decoder of an `encoder_decoder` reads
    segment 0 alone."""
    position_ids: Tensor | None = None
    """[B, T] int64: place of each token in its document; its place in the row unless given."""
    prefix_lengths: Tensor | None = None
    """[B] int64: so many tokens at the start of each row are seen by all of it."""
    decoder_input_ids: Tensor | None = None
    """[B, U] int64: what the decoder of an `encoder_decoder` reads, U <= N; `labels` are [B, U] then."""


class ModelOutput(NamedTuple):
    """Result of a forward pass. A tuple, so that ZeRO-3's hooks find the loss inside."""

    loss: Tensor
    """0-d: the objective, penalties included."""
    metrics: dict[str, Tensor]
    """Detached 0-d tensors by name; `cross_entropy` (nats, mean over labels that count) is always there."""
    by_token: Tensor | None = None
    """[B, T]: cross entropy of each label in nats, 0 where it is IGNORE; None while gradients are recorded."""
