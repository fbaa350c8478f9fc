"""Learned dropout: a mask in [0, 1] that the model computes, by causal attention, from the tensor it masks.

It saves no compute: the mask comes from the finished output (docs/model.md B).
"""

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import causal_attention
from model.config import ModelConfig, Site
from model.layers import Linear
from model.losses import entropy, l1
from model.noise import uniform


class MaskStatistics(NamedTuple):
    """Means over the elements of one mask, 0-d float32; the first two carry gradients."""

    entropy: Tensor
    """As penalised, in bits."""
    l1: Tensor
    """As penalised."""
    density: Tensor
    """Share of elements kept (after rounding)."""
    mask_mean: Tensor
    mask_near_zero: Tensor
    """Share of m < 0.1."""
    mask_near_one: Tensor
    """Share of m > 0.9."""
    mask_slope: Tensor
    """Mean |dm/dangle|: how much gradient reaches the angle, at most 0.5."""


Statistics = dict[str, MaskStatistics]
"""By mask, for example `enc_ff/00`: site and layer."""


def cosine_mask(angle: Tensor) -> Tensor:
    """m = 0.5 cos(angle) + 0.5, in [0, 1] (docs/model.md B2). Any shape."""
    return angle.cos() * 0.5 + 0.5


def straight_through(mask: Tensor, noise: Tensor) -> Tensor:
    """1 where noise < m, else 0, so that E = m for uniform noise; the gradient with respect to m is 1. Any shape."""
    return (noise < mask).to(mask.dtype) + (mask - mask.detach())


class LearnedDropout(nn.Module):
    """x -> x * m, with m = 0.5 cos(Attention(x) + shift) + 0.5 rounded as configured (docs/model.md B1-B3)."""

    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        """`layer` counts from 0 in its stream."""
        super().__init__()
        self.name = f"{site}/{layer:02d}"
        self.config = config.learned_dropout
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.shift = nn.Parameter(torch.full((config.width,), config.learned_dropout.shift_init))
        self._noise_site = zlib.crc32(self.name.encode())  # the same whatever other sites there are

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """Mask x [B, T, C].

        Args:
            keys: [B] int64, which key the noise of training; None asks for evaluation rounding.

        Returns:
            The masked x, and the statistics of this mask.
        """
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        angle = causal_attention(query, key, value, self.heads)
        mask = cosine_mask(_at_least_fp32(angle) + _at_least_fp32(self.shift))
        used = self._round(mask, keys)
        return x * used.to(x.dtype), {self.name: self._statistics(mask, used)}

    def _round(self, mask: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            return (mask >= 0.5).to(mask.dtype) if self.config.eval_rounding == "threshold" else mask
        if self.config.rounding == "none":
            return mask
        return straight_through(mask, uniform(keys, self._noise_site, (mask.shape[1], mask.shape[2])))

    def _statistics(self, mask: Tensor, used: Tensor) -> MaskStatistics:
        m = mask.detach()
        return MaskStatistics(
            entropy=entropy(mask, self.config.entropy.kind),
            l1=l1(mask, self.config.l1.kind),
            density=_share(used.detach() > 0.0),
            mask_mean=m.mean(),
            mask_near_zero=_share(m < 0.1),
            mask_near_one=_share(m > 0.9),
            mask_slope=(m * (1.0 - m)).sqrt().mean(),
        )


class NoDropout(nn.Module):
    """What stands at a site without learned dropout."""

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """x, and no statistics."""
        return x, {}


def dropout_at(config: ModelConfig, site: Site, layer: int) -> LearnedDropout | NoDropout:
    """What the configuration wants at a site of a layer."""
    return LearnedDropout(config, site, layer) if site in config.dropout_sites else NoDropout()


def _at_least_fp32(x: Tensor) -> Tensor:
    """bf16 has 8 bits of mantissa: too few for an angle near a turning point of the cosine."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _share(condition: Tensor) -> Tensor:
    return condition.float().mean()
