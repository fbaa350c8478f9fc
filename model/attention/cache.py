"""What a model keeps of the tokens it has read, so that each new one costs one position (docs/model.md G)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.ring import Ring
from model.attention.rule import Rows
from model.config.pattern_config import FULL, Patterns


class Cached(nn.Module):
    """A module that goes on where its cache ends, while it has one."""

    cache: "Cache | None" = None
    patterns: Patterns = (FULL,)
    """What it sees of a text, if it looks back."""


class Cache:
    """Keys and values of every attention, of both streams, between them and of the masks, for a batch of texts.

    Rows are padded at the left: texts of different lengths end together. Nothing attends to a pad, and a text's first
    token has position 0. Cached and full passes agree, since every attention is causal and the rest works token by
    token.
    """

    may_stop = True
    """Steps that no token takes any more need not be computed."""
    crosses = False
    """It keeps what is read of another sequence; else that is there as a whole in each pass."""

    def __init__(self, padding: Tensor, capacity: int) -> None:
        """An empty cache.

        Args:
            padding: [B] int64, pads at the left of each row.
            capacity: columns it can hold, pads included. At most the model's context: later positions exist in no
                table, and a window that moves on changes every vector in it. So it is read anew, into a new cache.
        """
        self.length = 0
        self.step = 0
        """Of layers that are applied several times, which time it is; each has keys and values of its own."""
        self._padding = padding
        self.padded = bool(padding.any())
        """Some row is."""
        self._capacity = capacity
        self._stored: dict[tuple[Cached, int], tuple[Tensor, ...]] = {}
        """Keys and values; keys of no channels where a key is told by its position."""
        self._rows: Rows | None = None
        self._masks: dict[tuple[Patterns, Ring | None], Tensor] = {}
        """Of the pass that is under way."""
        self._model: nn.Module | None = None
        self._using: list[dict[str, Any]] = []

    @torch.no_grad()
    def logits(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """Of the token after the last of input_ids [B, T], which come after those it was given before -> [B, V].

        Raises:
            ValueError: they are more than it has room for.
        """
        end = self.length + input_ids.shape[1]
        if end > self._capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self._capacity}")
        columns = torch.arange(end, device=input_ids.device)
        # Pads see each other: a softmax over nothing is NaN, which would spread.
        positions = columns - self._padding[:, None]
        self._rows = Rows(positions.shape, input_ids.device, segments=positions < 0, positions=positions)
        self._masks = {}
        with self.used_by(model):
            found = model(input_ids)[:, -1]
        self.length = end
        return found

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Every place in the model goes on where this cache ends."""
        if self._model is not model:  # to look at all modules for each token takes 3 % of a small model's time
            self._model = model
            self._using = [vars(module) for module in model.modules() if isinstance(module, Cached)]
        self.step = 0
        for place in self._using:
            place["cache"] = self
        try:
            yield
        finally:
            for place in self._using:
                del place["cache"]

    def asked(self, x: Tensor) -> Tensor:
        """Of what the model found for the new columns [B, T, C], what goes to the head, which is large: the last."""
        return x[:, -1:]

    def positions(self, count: int) -> Tensor:
        """Of the next `count` columns in their texts: [B, count] int64; 0 for pads."""
        columns = torch.arange(self.length, self.length + count, device=self._padding.device)
        return (columns - self._padding[:, None]).clamp(min=0)

    def next_positions(self, count: int) -> Tensor:
        """Of the tokens to predict behind those of the next `count` columns that the head is asked for: [B, n]."""
        return self.asked(self.positions(count)) + 1

    def extend(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add what an attention computed for the new columns.

        Args:
            key, value: [B, H, T, d].

        Returns:
            Keys and values, [B, H, S, d], all so far or what a layer with windows still needs, and which of them the
            new queries see: bool [B, G, T, S] for G groups of heads, None for all.
        """
        if ring := self._ring(place):
            return self._extend_ring(ring, place, key, value)
        return *self.append(place, key, value), self._mask(place.patterns)

    def append(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same at a place that sees everything: keys and values so far."""
        end, kept = self.length + key.shape[2], (place, self.step)
        if kept not in self._stored:
            self._stored[kept] = tuple(x.new_empty(*x.shape[:2], self._capacity, x.shape[3]) for x in (key, value))
        keys, values = self._stored[kept]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def append_one(self, place: Cached, column: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same in half the time for one new column, once there are some: `column` [1] int64 is `length`."""
        keys, values = self._stored[place, self.step]
        end = self.length + 1
        keys.index_copy_(2, column, key)
        values.index_copy_(2, column, value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def held(self, place: Cached) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, S, d] that such a place has added in the passes before; None before the first."""
        if (place, self.step) not in self._stored:
            return None
        keys, values = self._stored[place, self.step]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def holds(self) -> Tensor:
        """[B, S] bool: False for the pads among all columns, those of this pass included."""
        assert self._rows is not None and self._rows.positions is not None
        return self._rows.positions >= 0

    def places(self, place: Cached) -> tuple[Tensor, Tensor]:
        """Positions in their texts of the new columns [B, T] and of the keys [B, S] that `extend` gave; pads' are -1 or
        whatever they see one another by."""
        assert self._rows is not None and self._rows.positions is not None
        new = self._rows.positions[:, self.length :]
        if ring := self._ring(place):
            positions = self._ring_positions(ring)
            return new.clamp(min=-1), positions[:, : ring.size] if new.shape[1] == 1 else positions
        return new, self._rows.positions

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows [B'] int64, in this order; a row may come several times or not at all."""
        self._padding = self._padding[rows]
        self._stored = {place: (keys[rows], values[rows]) for place, (keys, values) in self._stored.items()}

    def _extend_ring(
        self, ring: Ring, place: Cached, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kept = place, self.step
        if kept not in self._stored:  # zeros, since pads see slots that hold nothing
            self._stored[kept] = tuple(x.new_zeros(*x.shape[:2], ring.size, x.shape[3]) for x in (key, value))
        keys, values = self._stored[kept]
        count, last = key.shape[2], self.length - 1 - self._padding
        if count == 1:
            rows, slots = torch.arange(len(last), device=last.device), ring.slot(last + 1)
            keys[rows, :, slots] = key[:, :, 0]
            values[rows, :, slots] = value[:, :, 0]
        else:
            keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            sources = ring.sources(last, count)[:, None, :, None]
            self._stored[kept] = tuple(
                x.gather(2, sources.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)
            )
        return keys, values, self._mask(place.patterns, ring)

    def _mask(self, patterns: Patterns, ring: Ring | None = None) -> Tensor | None:
        """What each new column sees of all, or of the slots of a ring; made once in a pass. None: everything."""
        assert self._rows is not None
        if patterns == (FULL,) and not self.padded and self._rows.length == self.length + 1:
            return None
        if (patterns, ring) not in self._masks:
            made = self._rows.dense(patterns, self.length) if ring is None else self._ring_mask(patterns, ring)
            self._masks[patterns, ring] = made
        return self._masks[patterns, ring]

    def _ring_mask(self, patterns: Patterns, ring: Ring) -> Tensor:
        """[B, G, T, S]: S are its slots and, behind them, more than one new column; one stands in its slot already."""
        positions = self._ring_positions(ring)
        alone = positions.shape[1] == ring.size + 1
        rows = Rows(positions.shape, positions.device, not alone, positions < 0, positions)
        return rows.dense(patterns, ring.size)[..., : ring.size if alone else None]

    def _ring_positions(self, ring: Ring) -> Tensor:
        """[B, S] of what its slots hold, and of the new columns; where there is one, its slot holds it, too."""
        assert self._rows is not None and self._rows.positions is not None
        new = self._rows.positions[:, self.length :]
        held = ring.held(new[:, -1] if new.shape[1] == 1 else new[:, 0] - 1)
        return torch.cat([held, new], dim=1).clamp(min=-1)

    def _ring(self, place: Cached) -> Ring | None:
        """Where less is kept of a place than all."""
        return Ring.of(place.patterns, self._capacity)
