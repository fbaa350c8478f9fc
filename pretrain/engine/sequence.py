"""Sequence parallelism: ranks that share the rows of a batch, each of them some positions of every row.

"DeepSpeed Ulysses" (Jacobs et al. 2023, arXiv:2309.14509, section 3.1): around attention the ranks of a group change
from all heads of their own positions to all positions of their own heads, and back. DeepSpeed's `DistributedAttention`
does so with an exchange for each of queries, keys and values, around a module that it wants to own, which would rename
parameters; so its exchange is taken, once for all three.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import bootstrap


class Ulysses:
    """A `RowExchange` among the ranks of a sequence group, which are side by side."""

    def __init__(self, ranks: Ranks) -> None:
        """A collective of each group by itself."""
        bootstrap()
        from deepspeed.sequence import layer

        self.size = ranks.sequence_parallel
        self.rank = ranks.rank % self.size
        first = ranks.rank - self.rank
        # Only its members make a group; else each rank would make all of them.
        self._group = dist.new_group(
            list(range(first, first + self.size)), timeout=ranks.timeout, use_local_synchronization=True
        )
        layer.register_all_to_all_group(self._group)
        self._exchange = layer._dim_zero_all_to_all

    def heads(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """See `RowExchange`."""
        shares = [x.unflatten(2, (self.size, -1)) for x in vectors]  # [B, S, ranks, H / ranks, d]
        sent = torch.cat([x.flatten(3) for x in shares], dim=-1).permute(2, 0, 1, 3)
        got = self._exchange(self._group, sent).permute(1, 0, 2, 3).flatten(1, 2)  # [B, T, …]
        parts = got.split([x.shape[3] * x.shape[4] for x in shares], dim=-1)
        return tuple(part.unflatten(-1, x.shape[3:]) for part, x in zip(parts, shares, strict=True))

    def positions(self, x: Tensor) -> Tensor:
        """See `RowExchange`."""
        sent = x.flatten(2).unflatten(1, (self.size, -1)).permute(1, 0, 2, 3)  # [ranks, B, S, …]
        got = self._exchange(self._group, sent).permute(1, 2, 0, 3)
        return got.unflatten(-1, x.shape[2:]).flatten(2, 3)
