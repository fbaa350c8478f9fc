"""What a model carries from step to step beside its parameters: persistent buffers.

Such as BatchNorm's statistics, the multipliers of block gates, and the centroids of routed attention.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from model.attention.routing import routings
from model.masks.block_gates import block_gates
from pretrain.engine.distributed import Ranks


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that belong into a checkpoint, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


class Buffers:
    """The persistent buffers of a model in training: between steps they are the same on all ranks.

    So whichever step a checkpoint is made at, one rank's are everybody's, and the run goes on as if there had been
    none; a mean made at each save would be rounded once more at each. Nothing is done for a model without buffers.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """`model` is on its device, with the same buffers on all ranks."""
        self.tensors = persistent_buffers(model)
        self._ranks = ranks
        self._before = {name: buffer.clone() for name, buffer in self.tensors.items()}

    def before_step(self) -> None:
        """Remember them."""
        for name, buffer in self.tensors.items():
            self._before[name].copy_(buffer)

    def after_step(self, applied: bool) -> None:
        """Agree on them; after a step that was not `applied` they are what they were before it. A collective.

        Floating-point buffers become their mean over the ranks. Others are counts: all ranks compute as many
        micro-batches.
        """
        if not applied:
            self.load(self._before)
            return
        averaged = [buffer for buffer in self.tensors.values() if buffer.is_floating_point()]
        if averaged and self._ranks.world_size > 1:
            mean = self._ranks.mean_on_device(torch.cat([buffer.flatten() for buffer in averaged]))
            for buffer, part in zip(averaged, mean.split([buffer.numel() for buffer in averaged]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set each to its value, in its own type."""
        for name, buffer in self.tensors.items():
            buffer.copy_(values[name])


class Multipliers:
    """Dual ascent: the multipliers of constraints on block gates move once a step, by what all ranks have seen.

    They are buffers of a model whose gates have any; nothing is done for another.
    """

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


class Centroids:
    """Those of routed attention follow their tokens once a step, by what all ranks have seen; see `Routing.move`.

    Each forward pass of training counts its tokens in. What activation checkpointing computes again is counted again,
    all of it, so that the means stay as they are.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """`model` is on its device, with the same buffers on all ranks."""
        self._routings = routings(model)
        self._ranks = ranks

    def after_step(self, applied: bool) -> None:
        """Move each; after a step that was not `applied` what was counted is forgotten. A collective."""
        if not self._routings:
            return
        if not applied:
            for routing in self._routings:
                routing.sums.zero_()
            return
        sums = torch.cat([routing.sums.flatten() for routing in self._routings])
        if self._ranks.world_size > 1:
            sums = self._ranks.sum_on_device(sums)
        for routing, part in zip(self._routings, sums.split([r.sums.numel() for r in self._routings]), strict=True):
            routing.move(part.view_as(routing.sums))
