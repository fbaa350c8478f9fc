"""What a model keeps of the tokens it has read, so that each new one costs one position (docs/model.md G)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.attention.rule import dense, rule


class Cached(nn.Module):
    """A module that goes on where its cache ends, while it has one."""

    cache: "Cache | None" = None


class Cache:
    """Keys and values of every attention, of both streams, between them and of the masks, for a batch of texts.

    Rows are padded at the left: texts of different lengths end together. Nothing attends to a pad, and a text's first
    token has position 0. Cached and full passes agree, since every attention is causal and the rest works token by
    token.
    """

    def __init__(self, padding: Tensor, capacity: int) -> None:
        """An empty cache.

        Args:
            padding: [B] int64, pads at the left of each row.
            capacity: columns it can hold, pads included. At most the model's context: later positions exist in no
                table, and a window that moves on changes every vector in it. So it is read anew, into a new cache.
        """
        self.length = 0
        self._padding = padding
        self._capacity = capacity
        self._stored: dict[Cached, tuple[Tensor, Tensor]] = {}
        self._visible = torch.empty(0)

    @torch.no_grad()
    def logits(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """Of the token after the last of input_ids [B, T], which come after those it was given before -> [B, V].

        Raises:
            ValueError: they are more than it has room for.
        """
        end = self.length + input_ids.shape[1]
        if end > self._capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self._capacity}")
        self._visible = self._mask(end)
        with self.used_by(model):
            found = model(input_ids)[:, -1]
        self.length = end
        return found

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Every place in the model goes on where this cache ends."""
        places = [module for module in model.modules() if isinstance(module, Cached)]
        for place in places:
            place.cache = self
        try:
            yield
        finally:
            for place in places:
                del place.cache

    def asked(self, x: Tensor) -> Tensor:
        """Of what the model found for the new columns [B, T, C], what goes to the head, which is large: the last."""
        return x[:, -1:]

    def positions(self, count: int) -> Tensor:
        """Of the next `count` columns in their texts: [B, count] int64; 0 for pads."""
        columns = torch.arange(self.length, self.length + count, device=self._padding.device)
        return (columns - self._padding[:, None]).clamp(min=0)

    def extend(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add what an attention computed for the new columns.

        Args:
            key, value: [B, H, T, d].

        Returns:
            All keys and all values so far, [B, H, S, d], and which the new queries see: bool [B, 1, T, S].
        """
        end = self.length + key.shape[2]
        if place not in self._stored:
            shape = (*key.shape[:2], self._capacity, key.shape[3])
            self._stored[place] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._stored[place]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end], self._visible

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows [B'] int64, in this order; a row may come several times or not at all."""
        self._padding = self._padding[rows]
        self._stored = {place: (keys[rows], values[rows]) for place, (keys, values) in self._stored.items()}

    def _mask(self, end: int) -> Tensor:
        """Of the columns from `length` to `end`: what each sees of all, [B, 1, T, S], aligned at the bottom right."""
        columns = torch.arange(end, device=self._padding.device)
        # Pads see each other: a softmax over nothing is NaN, which would spread.
        pads = columns < self._padding[:, None]
        return dense(rule(causal=True, segments=pads), len(pads), columns[self.length :], columns)
