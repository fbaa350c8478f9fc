"""Ordinary dropout, with noise that is a function of the sample and the place in the model (model/layers/noise.py)."""

import zlib

import torch
from torch import Tensor

from model.layers.noise import at_least


def noise_site(name: str) -> int:
    """The number of a place in the model: the same whatever other places draw."""
    return zlib.crc32(name.encode())


def dropout(x: Tensor, keys: Tensor | None, site: int, rate: float, first: int = 0) -> Tensor:
    """Set each element of x [B, T, C] to 0 with probability `rate`, the others grow by 1 / (1 - rate).

    "Dropout: a simple way to prevent neural networks from overfitting" (Srivastava et al. 2014), in training only:

    Args:
        keys: [B] int64, which key the noise; None asks for evaluation, which changes nothing.
        first: column of the first position, where another rank holds those before it.
    """
    if keys is None or not rate:
        return x
    kept = at_least(keys, site, (x.shape[1], x.shape[2]), rate, first)
    return x * kept.to(x.dtype).div_(1.0 - rate)


def weight_dropout(weights: Tensor, keys: Tensor, site: int, rate: float, context: int) -> Tensor:
    """The same for attention weights [B, H, T, T]; a shorter sequence meets the same noise, up to T = `context`."""
    _, heads, queries, width = weights.shape
    kept = at_least(keys, site, (queries, heads * context), rate).unflatten(-1, (heads, context))[..., :width]
    # Beside the weights in memory, so that both products run over rows.
    return weights * kept.transpose(1, 2).to(weights.dtype, memory_format=torch.contiguous_format).div_(1.0 - rate)
