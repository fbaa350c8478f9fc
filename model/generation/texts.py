"""Texts side by side: rows of tokens that grow at the right and are padded at the left."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """What a step has drawn for B texts, n tokens of each, and from what."""

    numbers: list[int]
    """Of the B prompts."""
    tokens: Tensor
    """[B, n] int64, the end token, and what was drawn behind it, included."""
    logits: Tensor
    """[B, n, V]."""
    present: Tensor | None
    """[B, n, V] bool, tokens that each text held before; None where that changes nothing."""
    drafts: Tensor | None = None
    """[B, n] int64, what a draft proposed in their place, -1 where it proposed nothing; None without drafts."""


class Texts:
    """Those that go on."""

    def __init__(self, prompts: Sequence[Tensor], generators: Sequence[torch.Generator] | None) -> None:
        """Prompts [T0] int64 each, on one device, and the source of each one's draws; torch's own unless given.

        Raises:
            ValueError: a prompt is empty.
        """
        if not all(map(len, prompts)):
            raise ValueError("a prompt needs at least one token")
        self.numbers = list(range(len(prompts)))
        self.generators: Sequence[torch.Generator | None] = generators or [None] * len(prompts)
        longest = max(map(len, prompts), default=0)
        # A text's own first token fills its row, so that the row holds no token that the text does not.
        rows = [torch.cat([prompt[:1].expand(longest - len(prompt)), prompt]) for prompt in prompts]
        self.ids = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
        """[B, T] int64."""
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.ids.device)
        """[B] int64: columns at the left that are none of the text."""

    def add(self, tokens: Tensor) -> None:
        """As many for each text, [B, n] int64."""
        self.ids = torch.cat([self.ids, tokens], dim=1)

    def leave(self, ended: Collection[int]) -> Tensor | None:
        """Go on without texts of these numbers: the rows that stay, [B'] int64; None if all do."""
        stay = [row for row, number in enumerate(self.numbers) if number not in ended]
        if len(stay) == len(self.numbers):
            return None
        rows = torch.tensor(stay, dtype=torch.int64, device=self.ids.device)
        self.numbers = [self.numbers[row] for row in stay]
        self.generators = [self.generators[row] for row in stay]
        self.ids, self.padding = self.ids[rows], self.padding[rows]
        return rows
