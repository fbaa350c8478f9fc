"""The penalties on masks, and the schedule of their weights."""

from typing import Literal

import torch
from torch import Tensor

from model.attention.means import mean
from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import PenaltyConfig

_EPS = 1e-6


def entropy(mask: Tensor, kind: Literal["shannon", "complement", "binary"], visible: Visible = CAUSAL) -> Tensor:
    """Mean entropy in bits of mask values in [0, 1], before rounding (docs/model.md B4).

    `shannon` is -m log2 m, `complement` the same of 1 - m, `binary` their sum. Gradients are finite at 0 and 1,
    where they vanish.

    Args:
        mask: any shape, float32; [B, T, C] where `visible` knows of padding, which is left out.

    Returns:
        0-d float32.
    """
    m = mask.clamp(_EPS, 1.0 - _EPS)
    bits = torch.zeros((), device=m.device)
    if kind in ("shannon", "binary"):
        bits = bits - mean(m * m.log2(), visible)
    if kind in ("complement", "binary"):
        bits = bits - mean((1.0 - m) * (1.0 - m).log2(), visible)
    return bits


def l1(mask: Tensor, kind: Literal["linear", "squared"], visible: Visible = CAUSAL) -> Tensor:
    """Mean of m, or of m²/2, over mask values before rounding (docs/model.md B5). Shapes as above -> 0-d float32."""
    return mean(mask, visible) if kind == "linear" else mean(mask.square(), visible) / 2


def weight_at(step: Tensor, penalty: PenaltyConfig) -> Tensor:
    """Weight of a penalty at an optimizer step (0-d int64) as 0-d float32, without waiting for the device."""
    since = step - penalty.start_step
    share = (since / penalty.ramp_steps).clamp(0.0, 1.0) if penalty.ramp_steps else since >= 0
    return share.float() * penalty.weight
