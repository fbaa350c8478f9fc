"""What may be seen of a text: by the vectors that are refined, of one another, and by the decoder, of them.

A vector may be read once all tokens that it knows are there: those of its chunk, or the prefix. Everything counts by
positions in a text, so that texts in a row (`document_mask`) and pads at the left are no special cases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.batch import Batch


@dataclass(frozen=True)
class Reading:
    """Rows of tokens that are read."""

    chunk: int
    """Tokens of a chunk; 0 where a prefix is read."""
    positions: Tensor
    """[B, T] int64, or [1, T] where all rows are alike: place of each token in its text; below 0 for pads."""
    segments: Tensor | None = None
    """[B, T], number of each token's text, which none leaves."""
    prefixes: Tensor | None = None
    """[B] int64, tokens of each row that may be read; nothing may be unless given. For `chunk` 0."""

    @classmethod
    def of(cls, ids: Tensor, batch: Batch | None, chunk: int) -> "Reading":
        """Inputs [B, T]; each row is one text unless a batch says otherwise."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        if batch is None:
            return cls(chunk, places)
        positions = places if batch.position_ids is None else batch.position_ids
        return cls(chunk, positions, batch.segment_ids, None if chunk else batch.prefix_lengths)

    def of_rows(self, rows: Tensor) -> "Reading":
        """Rows [n] int64 of B."""
        segments = None if self.segments is None else self.segments[rows]
        prefixes = None if self.prefixes is None else self.prefixes[rows]
        return Reading(self.chunk, self.positions[rows], segments, prefixes)

    def within(self) -> Tensor:
        """[B, 1, T, T] bool, or [1, 1, T, T]: whether the vector of token q may know that of token k.

        Of its own chunk and all chunks before, or of the prefix; behind the prefix, of tokens up to its own, though
        nothing reads what is there.
        """
        q, k = self.positions[:, :, None], self.positions[:, None]
        if self.chunk:
            seen = k.div(self.chunk, rounding_mode="floor") <= q.div(self.chunk, rounding_mode="floor")
        else:
            seen = k <= q if self.prefixes is None else (k <= q) | (k < self.prefixes[:, None, None])
        if self.segments is not None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None])
        return seen[:, None]

    def across(self, start: int = 0) -> Tensor:
        """[B, 1, T - start, 1 + T] bool, or of one row: whether the decoder at q, from column `start` on, reads k.

        Those of chunks that are finished with token q, or of the prefix. The first column is the null memory, which
        everything reads: before the first chunk is finished there is nothing else.
        """
        q, k = self.positions[:, start:, None], self.positions[:, None]
        if self.chunk:
            seen = k // self.chunk < (q + 1) // self.chunk
        else:
            ends = 0 if self.prefixes is None else self.prefixes[:, None, None]
            seen = (k < ends).expand(-1, q.shape[1], -1)
        seen = seen & (k >= 0)
        if self.segments is not None:
            seen = seen & (self.segments[:, start:, None] == self.segments[:, None])
        return functional.pad(seen, (1, 0), value=True)[:, None]
