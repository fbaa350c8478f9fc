"""The penalties on masks, and the schedule of their weights."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from model.attention.means import mean
from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import PenaltyConfig

EntropyKind = Literal["shannon", "complement", "binary"]
_EPS = 1e-6


def entropy(mask: Tensor, kind: EntropyKind, visible: Visible = CAUSAL) -> Tensor:
    """Mean entropy in bits of mask values in [0, 1], before rounding (docs/model.md B4).

    `shannon` is -m log2 m, `complement` the same of 1 - m, `binary` their sum. Gradients are finite at 0 and 1,
    where they vanish.

    Args:
        mask: any shape, float32; [B, T, C] where `visible` knows of padding, which is left out.

    Returns:
        0-d float32.
    """
    return mean(_Bits.apply(mask, kind), visible)


class _Bits(torch.autograd.Function):
    """Entropy of each element. Its slope is made beside it, of the same logarithms, and is all that is kept."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, kind: EntropyKind) -> Tensor:
        m = mask.clamp(_EPS, 1.0 - _EPS)
        inside = mask.clone().eq_(m)
        if kind == "complement":
            m = 1.0 - m
        log = m.log2()
        bits = (m * log).neg_()
        if kind == "binary":
            rest = 1.0 - m
            other = rest.log2()
            bits.sub_(rest.mul_(other))
            slope = other.sub_(log)
        else:
            slope = log.add_(1.0 / math.log(2.0))
            slope = slope if kind == "complement" else slope.neg_()
        ctx.save_for_backward(slope.mul_(inside))
        return bits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def l1(mask: Tensor, kind: Literal["linear", "squared"], visible: Visible = CAUSAL) -> Tensor:
    """Mean of m, or of m²/2, over mask values before rounding (docs/model.md B5). Shapes as above -> 0-d float32."""
    return mean(mask, visible) if kind == "linear" else mean(mask.square(), visible) / 2


def weight_at(step: Tensor, penalty: PenaltyConfig) -> Tensor:
    """Weight of a penalty at an optimizer step (0-d int64) as 0-d float32, without waiting for the device."""
    since = step - penalty.start_step
    share = (since / penalty.ramp_steps).clamp(0.0, 1.0) if penalty.ramp_steps else since >= 0
    return share.float() * penalty.weight
