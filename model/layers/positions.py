"""Positions without parameters: sines added to the tokens, and rotations of queries and keys."""

import torch
from torch import Tensor

_BASE = 10_000.0


def _angles(positions: Tensor, pairs: int) -> Tensor:
    """Positions [..., T] int64 -> p / 10000^(i / pairs), [..., T, pairs] float32."""
    exponents = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
    return positions[..., None] * _BASE**-exponents


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Sines of each position: channel 2i is sin(p / 10000^(2i/C)), channel 2i + 1 its cosine.

    "Attention Is All You Need", section 3.5.

    Args:
        positions: [..., T] int64.

    Returns:
        [..., T, C] float32.
    """
    angles = _angles(positions, width // 2 + width % 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d/2) by p / 10000^(2i/d), so that products depend on distances only.

    "RoFormer" (Su et al. 2021, arXiv:2104.09864), section 3.2, with channels paired across the halves of a head.

    Args:
        x: queries or keys [B, T, H, d], d even.
        positions: [T] or [B, T] int64.

    Returns:
        [B, T, H, d], of x's type; computed in float32 at least.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    angles = _angles(positions, x.shape[-1] // 2).to(exact)[..., None, :]
    sin, cos = angles.sin(), angles.cos()
    first, second = x.to(exact).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
