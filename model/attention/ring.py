"""What is kept of a text whose later tokens need only its first and its last positions: slots that are used again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config.pattern_config import Patterns


@dataclass(frozen=True)
class Ring:
    """Slots for the first `first` positions of a text, and behind them for its last `recent`."""

    first: int
    recent: int

    @classmethod
    def of(cls, patterns: Patterns, capacity: int) -> "Ring | None":
        """What a layer's patterns need of `capacity` columns; None if that is all of them."""
        each = [pattern.retained() for pattern in patterns]
        needed = [pair for pair in each if pair is not None]
        if len(needed) < len(each):
            return None
        ring = cls(max(first for first, _ in needed), max(recent for _, recent in needed))
        return ring if ring.size < capacity else None

    @property
    def size(self) -> int:
        """Slots."""
        return self.first + self.recent

    def held(self, last: Tensor) -> Tensor:
        """The position that each slot holds once a text has come to its position `last` [B]: [B, size]; -1 for none."""
        slots = torch.arange(self.size, device=last.device)
        newest = last[:, None] - (last[:, None] - slots) % self.recent
        found = torch.where(slots < self.first, slots, newest)
        return found.masked_fill((found > last[:, None]) | ((slots >= self.first) & (found < self.first)), -1)

    def slot(self, position: Tensor) -> Tensor:
        """Where positions go; a pad, before the text's first, goes to slot 0, which that will take over."""
        behind = self.first + (position - self.first) % self.recent
        return torch.where(position < self.first, position.clamp(min=0), behind)

    def sources(self, last: Tensor, count: int) -> Tensor:
        """Which of its slots, and of `count` new columns behind them, each slot holds after these: [B, size].

        `last` [B] is the position before the new columns; negative where the text has not begun.
        """
        held = self.held(last + count)
        slots = torch.arange(self.size, device=last.device)
        return torch.where(held > last.clamp(min=-1)[:, None], self.size - 1 + held - last[:, None], slots)
