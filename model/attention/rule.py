"""One rule says what a query sees of the keys; every mask is made of it: dense, in blocks, or of a cached step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from model.config.pattern_config import FULL, Pattern

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether query q of row b sees key k, both by their columns: the form (b, h, q, k) that FlexAttention asks for."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, and what parts of them may know of one another, whatever a pattern lets be seen."""

    shape: torch.Size
    """(B, T)."""
    device: torch.device
    causal: bool = True
    """Keys up to the query's own column; else all."""
    segments: Tensor | None = None
    """[B, T], number of each token's document, which no query leaves."""
    positions: Tensor | None = None
    """[B, T] int64, place of each token in its document, from which patterns count; its column unless given."""
    prefixes: Tensor | None = None
    """[B], so many keys at the start of a row are seen by all of it."""

    @property
    def length(self) -> int:
        """T."""
        return self.shape[1]

    @property
    def whole(self) -> bool:
        """A row is one text, read in one way."""
        return self.segments is None and self.prefixes is None

    @property
    def alike(self) -> bool:
        """Every row, and every batch of rows as long, sees the same."""
        return self.whole and self.positions is None

    def rule(self, pattern: Pattern = FULL) -> Rule:
        """What is seen with a pattern."""
        causal, segments, positions, prefixes = self.causal, self.segments, self.positions, self.prefixes

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = q >= k if causal else k >= 0
            if not pattern.full:
                own, other = (q, k) if positions is None else (positions[b, q], positions[b, k])
                seen = seen & pattern.sees(own, other)
            if prefixes is not None:
                seen = seen | (k < prefixes[b])
            if segments is not None:
                seen = seen & (segments[b, q] == segments[b, k])
            return seen

        return sees

    def dense(self, patterns: Iterable[Pattern] = (FULL,), start: int = 0) -> Tensor:
        """[B, G, T - start, T] bool, of queries from column `start` on: True where one sees a key, with each of G
        patterns; one row for all that are alike."""
        columns = torch.arange(self.length, device=self.device)
        return torch.cat([self._at(pattern, columns[start:, None], columns)[:, None] for pattern in patterns], dim=1)

    def grid(self, pattern: Pattern, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, n, Q, K] bool at columns [n, Q] of queries and [n, K] of keys, some of which may lie outside the rows.

        Nothing sees a key outside, but for a query outside, which sees itself: a softmax over nothing is NaN.
        """
        queries, keys = queries[..., None], keys[..., None, :]
        inside = (keys >= 0) & (keys < self.length)
        last = self.length - 1
        seen = self._at(pattern, queries.clamp(max=last), keys.clamp(0, last)) & inside & (queries <= last)
        return seen | ((queries == keys) & (queries > last))

    def blocks(self, pattern: Pattern = FULL) -> BlockMask:
        """The same for FlexAttention."""
        rows = None if self.alike else self.shape[0]
        return create_block_mask(self.rule(pattern), rows, None, self.length, self.length, device=self.device.type)

    def _at(self, pattern: Pattern, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, ...] bool, at columns that broadcast."""
        rows = 1 if self.alike else self.shape[0]
        row = torch.arange(rows, device=self.device).reshape(-1, *[1] * max(queries.dim(), keys.dim()))
        seen = self.rule(pattern)(row, torch.zeros_like(row), queries, keys)
        return seen.expand(rows, *torch.broadcast_shapes(queries.shape, keys.shape))
