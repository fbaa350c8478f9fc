"""One rule says what a query sees of the keys; every mask is made of it: dense, in blocks, or of a cached step."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether query q of row b sees key k, both by their columns: the form (b, h, q, k) that FlexAttention asks for."""


def rule(causal: bool, segments: Tensor | None = None, prefixes: Tensor | None = None) -> Rule:
    """What is seen in rows of tokens.

    Args:
        causal: keys up to the query's own column; else all.
        segments: [B, T], number of each token's document, which no query leaves.
        prefixes: [B], so many keys at the start of a row are seen by all of it.
    """

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k if causal else k >= 0
        if prefixes is not None:
            seen = seen | (k < prefixes[b])
        if segments is not None:
            seen = seen & (segments[b, q] == segments[b, k])
        return seen

    return sees


def dense(sees: Rule, rows: int, queries: Tensor, keys: Tensor) -> Tensor:
    """The rule at columns [T] of queries and [S] of keys: [B, 1, T, S] bool, True where a query sees a key."""
    row = torch.arange(rows, device=keys.device)[:, None, None]
    head = torch.zeros((), dtype=torch.int64, device=keys.device)
    return sees(row, head, queries[:, None], keys).expand(rows, len(queries), len(keys))[:, None]


def in_blocks(sees: Rule, rows: int, length: int, device: torch.device) -> BlockMask:
    """The rule over rows of `length` tokens, for FlexAttention."""
    return create_block_mask(sees, rows, None, length, length, device=device.type)
