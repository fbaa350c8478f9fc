"""What is kept of texts that grow: the decoder's keys and values, and those of the refined vectors that it reads."""

import torch
from torch import Tensor

from model.architectures.refined.reading import Reading
from model.attention.cache import Cache, Cached


class Thoughts(Cache):
    """A cache of the decoder's own attention, beside which memory is exchanged whenever something was read anew."""

    crosses = True

    def __init__(
        self, padding: Tensor, capacity: int, crossing: set[Cached], chunk: int, prefixes: Tensor | None = None
    ) -> None:
        """Nothing was read yet; see `Cache`.

        Args:
            crossing: the attentions that read memory.
            chunk: as `Reading` has it.
            prefixes: [B], as `Reading` has them.
        """
        super().__init__(padding, capacity)
        self._crossing, self._chunk, self._prefixes = crossing, chunk, prefixes
        self._memory: Tensor | None = None
        self._is_fresh = True
        self._kept: dict[Cached, tuple[Tensor, Tensor]] = {}

    def reading(self, count: int) -> Reading:
        """Of the first `count` columns."""
        positions = torch.arange(count, device=self._padding.device) - self._padding[:, None]
        return Reading(self._chunk, positions, (positions < 0).long(), self._prefixes)

    def remember(self, rows: Tensor, columns: Tensor, memory: Tensor, count: int) -> None:
        """Vectors [n, C] of rows and columns [n] int64, beside those that are known; of `count` columns in all."""
        held = memory.new_zeros(len(self._padding), count, memory.shape[-1])
        if self._memory is not None:
            held[:, : self._memory.shape[1]] = self._memory
        held[rows, columns] = memory
        self._memory, self._is_fresh = held, True

    def fresh(self, like: Tensor) -> Tensor | None:
        """Memory [B, S, C] that was not read yet, S = 0 before there is any; None: keys and values of all are kept.

        `like` [B, T, C] has its type.
        """
        is_fresh, self._is_fresh = self._is_fresh, False
        memory = like[:, :0] if self._memory is None else self._memory
        return memory if is_fresh else None

    def extend(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.extend`; of memory, keys and values [B, H, 1 + S, d] take the place of those that were kept."""
        if place not in self._crossing:
            return super().extend(place, key, value)
        if key.shape[2]:
            self._kept[place] = key, value
        key, value = self._kept[place]
        assert self._rows is not None
        across = self.reading(self._rows.length).across(self.length)
        return key, value, across[..., : key.shape[2]]

    def reorder(self, rows: Tensor) -> None:
        """As `Cache.reorder`."""
        super().reorder(rows)
        self._kept = {place: (keys[rows], values[rows]) for place, (keys, values) in self._kept.items()}
        self._memory = None if self._memory is None else self._memory[rows]
        self._prefixes = None if self._prefixes is None else self._prefixes[rows]
