"""Dual ascent: the multipliers of constraints on block gates move once a step, by what all ranks have seen."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.masks.block_gates import block_gates
from pretrain.engine.distributed import Ranks


class Multipliers:
    """Those of a model whose gates have any, which are buffers of it; nothing is done for another."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """`model` is on its device, with the same buffers on all ranks."""
        self._gates = [gates for gates in block_gates(model) if gates.config.kind == "cosine"]
        self._ranks = ranks

    def after_step(self, micro_batches: Sequence[dict[str, Tensor]]) -> None:
        """Move each by the mean of its m over the tokens of a step that was applied; a collective.

        No forward pass does it: one that activation checkpointing computes again would do it twice.
        """
        if not self._gates:
            return
        table = [[metrics[f"mask_mean/{gates.name}"] for metrics in micro_batches] for gates in self._gates]
        means = torch.stack([torch.stack(row).mean() for row in table])
        if self._ranks.world_size > 1:
            means = self._ranks.mean_on_device(means)
        for gates, mean in zip(self._gates, means, strict=True):
            gates.ascend(mean)
