"""Gaps in a text are filled, each token from all that is known before and behind it (docs/model.md I)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.architectures.two_stream.model import TwoStreams
from model.attention.cache import Cache
from model.generation.sampling import Sampling


class Filled(NamedTuple):
    """A token of a gap."""

    place: int
    """In the text."""
    token: int
    logits: Tensor
    """[V], that it was drawn by."""


class OrderedCache(Cache):
    """Of one text whose tokens come in another order than its own."""

    def __init__(self, order: Tensor, capacity: int) -> None:
        """`order`: [S] int64, places in the text, in the order in which they are read."""
        super().__init__(torch.zeros_like(order[:1]), capacity)
        self._order = order[None]

    def positions(self, count: int) -> Tensor:
        """As `Cache.positions`."""
        return self._order[:, self.length : self.length + count]

    def next_positions(self, count: int) -> Tensor:
        """Of the token that comes next: [1, 1]."""
        return self._order[:, self.length + count : self.length + count + 1]


@torch.no_grad()
def fill(
    model: TwoStreams,
    text: Tensor,
    sampling: Sampling,
    *,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Filled]:
    """Draw what is missing, from left to right; what is known is read first, and each token once.

    Args:
        model: in evaluation mode.
        text: [S] int64, -1 where a token is missing, S <= context + 1; one is known at least.
        eos_id: no gap is filled with it.
        generator: as `Sampling.draw` takes it.
    """
    known, missing = ((text < 0) == gap for gap in (False, True))
    order = torch.cat([known.nonzero()[:, 0], missing.nonzero()[:, 0]])
    if not known.any() or len(text) > model.config.context + 1:
        raise ValueError(f"{int(known.sum())} tokens of {len(text)} are known, for a context of {model.config.context}")
    cache, read = OrderedCache(order, model.config.context), text[known][None]
    present = torch.zeros(1, model.config.vocab_size or 0, dtype=torch.bool, device=text.device)
    for place in missing.nonzero()[:, 0].tolist():
        present[0, read[0]] = True
        logits = cache.logits(model, read)
        if eos_id is not None:
            logits[:, eos_id] = -torch.inf
        read = sampling.draw(logits, present, [generator])[:, None]
        yield Filled(place, int(read), logits[0])
