"""A cache whose last columns can be taken back: for tokens that are read before it is known that they stay."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention.cache import Cache, Cached
from model.attention.ring import Ring
from model.config.pattern_config import FULL, Patterns


class _Pass(NamedTuple):
    """Of some rows, b of them, which get n more columns each, or fewer and what stands for them."""

    rows: Tensor | slice
    """[b] int64; a slice where it is all of them."""
    columns: Tensor
    """[b, n] int64, where they go: what stands for none behind all others."""
    positions: Tensor
    """[b, n] int64, the same, but of what stands for none that of a column that is there."""
    end: int
    """Columns of the longest row."""
    alike: slice | None
    """The columns of all rows where they are the same."""


class RollbackCache(Cache):
    """Of texts side by side, which may hold different numbers of tokens, each from column 0 on.

    Layers with windows keep all, since a ring has overwritten what would be wanted again.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        """Empty; `capacity` is that of `Cache`."""
        super().__init__(torch.zeros(rows, dtype=torch.int64, device=device), capacity)
        self.lengths = [0] * rows
        """Tokens of each text."""
        self._device = device
        self._pass: _Pass | None = None

    @contextmanager
    def going_on(self, model: nn.Module, rows: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Each place in the model adds `counts` columns to these rows, the most of them to each: so many are computed.

        Raises:
            ValueError: there is no room for them.
        """
        starts = [self.lengths[row] for row in rows]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(ends) > self._capacity:
            raise ValueError(f"{max(ends)} tokens do not fit a cache of {self._capacity}")
        alike = len(set(starts)) == len(set(counts)) == 1
        first, last = (torch.tensor(some, device=self._device)[:, None] for some in (starts, ends))
        columns = first + torch.arange(max(counts), device=self._device)
        self._pass = _Pass(
            slice(None) if list(rows) == list(range(len(self.lengths))) else torch.tensor(rows, device=self._device),
            columns.where(columns < last, self._capacity),
            columns.clamp(max=max(ends) - 1),
            max(ends),
            slice(starts[0], ends[0]) if alike else None,
        )
        self._masks = {}
        with self.used_by(model):
            yield
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end

    def positions(self, count: int) -> Tensor:
        """Of the columns of this pass in their texts, [b, n] int64."""
        return self._going.positions

    def extend(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.extend`, of the rows of this pass."""
        return *self.append(place, key, value), self._mask(place.patterns)

    def append(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Cache.append`, of the rows of this pass."""
        going, kept = self._going, (place, self.step)
        if kept not in self._stored:
            room = (len(self.lengths), self._capacity + 1)  # the last column takes what stands for none
            self._stored[kept] = tuple(x.new_zeros(room[0], x.shape[1], room[1], x.shape[3]) for x in (key, value))
        keys, values = self._stored[kept]
        for held, new in ((keys, key), (values, value)):
            if going.alike is not None:
                held[going.rows, :, going.alike] = new
            else:
                numbers = torch.arange(len(held), device=self._device)[going.rows]
                held[numbers[:, None], :, going.columns] = new.transpose(1, 2)
        return keys[going.rows, :, : going.end], values[going.rows, :, : going.end]

    def places(self, place: Cached) -> tuple[Tensor, Tensor]:
        """As `Cache.places`."""
        return self._going.positions, torch.arange(self._going.end, device=self._device)[None]

    def truncate(self, row: int, length: int) -> None:
        """Forget all columns of a row but the first `length`; those that come next are written over them."""
        assert 0 <= length <= self.lengths[row]
        self.lengths[row] = length

    @property
    def _going(self) -> _Pass:
        assert self._pass is not None
        return self._pass

    def _mask(self, patterns: Patterns, ring: Ring | None = None) -> Tensor | None:
        """[b, G, n, S] bool, or of one row where all are alike; made once in a pass. None: everything."""
        going = self._going
        if patterns == (FULL,) and going.alike is not None and going.columns.shape[1] == 1:
            return None
        if (patterns, None) not in self._masks:
            own = going.positions[: 1 if going.alike is not None else None, :, None]
            other = torch.arange(going.end, device=self._device)
            seen = [other <= own if pattern.full else (other <= own) & pattern.sees(own, other) for pattern in patterns]
            self._masks[patterns, None] = torch.stack(seen, dim=1)
        return self._masks[patterns, None]
