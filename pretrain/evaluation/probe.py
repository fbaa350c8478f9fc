"""Which elements of the masks change sides from one validation to the next, on text that stays the same."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.sampling.kinds import AnyWindows
from model.masks.block_gates import BlockFeedForward
from model.masks.learned_dropout import LearnedDropout
from pretrain.evaluation.batches import Batches
from pretrain.metric_names import FLIPS

TOKENS = 1024
"""About as many are looked at."""


class Probe:
    """The first windows of the held-out text, and how the masks stood there when it was last asked."""

    def __init__(self, windows: AnyWindows, batches: Batches, *, compiled: bool) -> None:
        """`compiled`: the model's layers are, and what is watched here must not have them compiled anew.

        Where ranks share rows, each looks at its own positions.
        """
        rows = min(len(windows), max(1, TOKENS // windows.context))
        self._batch = batches.of_validation(windows, np.arange(rows))
        self._compiled = compiled
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def flips(self, model: nn.Module) -> dict[str, float]:
        """Share of elements whose m crossed 0.5 since the last call, or of blocks that opened or closed; a collective.

        Returns:
            the mean over all masks as `gate/flips`, and each one's as `gate/flips/enc_ff/00`; nothing the first time,
            nor for a model with neither learned dropout nor block gates.
        """
        masks = [module for module in model.modules() if isinstance(module, LearnedDropout | BlockFeedForward)]
        if not masks:
            return {}
        model.eval()
        for mask in masks:
            mask.sides = []
        try:
            with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
                model(self._batch)
            now = {mask.name: torch.cat(mask.sides) for mask in masks if mask.sides}
        finally:
            for mask in masks:
                mask.sides = None
        before, self._before = self._before, now
        if not before:
            return {}
        found = {FLIPS.of(name): (before[name] != sides).float().mean().item() for name, sides in now.items()}
        return {FLIPS: sum(found.values()) / len(found)} | found
