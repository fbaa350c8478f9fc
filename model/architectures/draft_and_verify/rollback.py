"""A cache whose last columns can be taken back: for tokens that are read before it is known that they stay."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.attention.cache import Cache, Cached
from model.attention.rule import Rows


class RollbackCache(Cache):
    """Of one text. Layers with windows keep all, since a ring has overwritten what would be wanted again."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Empty; `capacity` is that of `Cache`."""
        super().__init__(torch.zeros(1, dtype=torch.int64, device=device), capacity)
        self._device = device

    @contextmanager
    def going_on(self, model: nn.Module, count: int) -> Iterator[None]:
        """Each place in the model adds `count` columns.

        Raises:
            ValueError: there is no room for them.
        """
        end = self.length + count
        if end > self._capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self._capacity}")
        self._rows = Rows(torch.Size((1, end)), self._device)
        self._masks = {}
        with self.used_by(model):
            yield
        self.length = end

    def extend(self, place: Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.extend`."""
        return *self.append(place, key, value), self._mask(place.patterns)

    def places(self, place: Cached) -> tuple[Tensor, Tensor]:
        """As `Cache.places`."""
        assert self._rows is not None
        columns = torch.arange(self._rows.length, device=self._device)[None]
        return columns[:, self.length :], columns

    def truncate(self, length: int) -> None:
        """Forget all columns but the first `length`; those that come next are written over them."""
        assert 0 <= length <= self.length
        self.length = length
