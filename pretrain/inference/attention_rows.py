"""Attention weights small enough for a page."""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AttentionRows:
    """Keeps of each attention what fits into a number of bytes, one for a weight: round(255 sqrt(w)).

    Every head of every token, if that fits; else the mean over the heads; else that of the last tokens alone.
    """

    def __init__(self, heads: Sequence[int], length: int, limit: int) -> None:
        """Of a text of `length` tokens, in `limit` bytes; `heads` of each attention."""
        self.heads_apart = sum(heads) * _below(length) <= limit
        self.first = 0
        """The first token whose row is kept."""
        while not self.heads_apart and len(heads) * (_below(length) - _below(self.first)) > limit:
            self.first += 1
        rows, columns = torch.tril_indices(length - self.first, length, offset=self.first)
        self._index = rows + self.first, columns
        self._maps: dict[str, dict[str, Any]] = {}

    def add(self, name: str, weights: Tensor) -> None:
        """Weights [H, T, T] of one attention; see `model.generation.inspection.Look`."""
        if not self.heads_apart:
            weights = weights.mean(0, keepdim=True)
        kept = (weights.cpu()[:, *self._index].sqrt() * 255).round().to(torch.uint8)
        self._maps[name] = {"heads": len(kept), "rows": base64.b64encode(kept.numpy().tobytes()).decode()}

    def packed(self) -> dict[str, Any]:
        """For JSON: rows of each head after the other, row t with the t + 1 weights up to its own token."""
        return {"first": self.first, "heads_apart": self.heads_apart, "maps": self._maps}


def _below(length: int) -> int:
    """Weights of so many tokens on themselves and those before them."""
    return length * (length + 1) // 2
