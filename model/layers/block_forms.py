"""A feed forward whose hidden units are cut into blocks, in three forms that give the same (docs/gates.md).

With G blocks of S hidden units, of which token n weighs block g by w[n, g]:

    out[n] = sum over g of w[n, g] · activation(x[n] up[g]ᵀ) down[g]

The weights of a block lie together, so a closed block's are not read. All products are torch's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.config.transformer import Activation
from model.layers.layers import activate


class Blocks(NamedTuple):
    """The two maps of G blocks."""

    up: Tensor
    """[G, S, C], or [G, 2S, C] for SwiGLU: of each block the gates, then the values."""
    up_bias: Tensor | None
    """[G, S] or [G, 2S]."""
    down: Tensor
    """[G, S, C]."""
    activation: Activation


def all_blocks(x: Tensor, weights: Tensor, blocks: Blocks) -> Tensor:
    """Every block for every token: x [N, C], weights [N, G] -> [N, C].

    A closed block weighs 0; the gradient of its weight is that of what it would have added.
    """
    bias = None if blocks.up_bias is None else blocks.up_bias.flatten()
    hidden = functional.linear(x, blocks.up.flatten(0, 1), bias).unflatten(-1, blocks.up.shape[:2])
    return (activate(hidden, blocks.activation) * weights[..., None]).flatten(1) @ blocks.down.flatten(0, 1)


def open_blocks(x: Tensor, weights: Tensor, opened: Tensor, blocks: Blocks) -> Tensor:
    """Tokens grouped by the blocks that they open, however many: x [N, C], weights and opened bool [N, G] -> [N, C].

    No token is dropped. The numbers of tokens go to the host. A block that nobody opens has a gradient of 0, so that
    every parameter has one on every rank.
    """
    rows = len(x)
    if x.device.type == "cpu" and x.itemsize < torch.float32.itemsize:
        x, weights, opened = _in_few_sizes(x, weights, opened)
    sizes = opened.sum(0).tolist()
    of_block, row = opened.t().nonzero(as_tuple=True)  # sorted by block
    grouped = x.index_select(0, row).split(sizes)
    factors = weights[row, of_block][:, None].split(sizes)
    biases = [None] * len(sizes) if blocks.up_bias is None else blocks.up_bias.unbind()
    maps = zip(grouped, factors, blocks.up.unbind(), biases, blocks.down.unbind(), sizes, strict=True)
    updates = [
        (activate(functional.linear(tokens, up, bias), blocks.activation) * factor) @ down
        for tokens, factor, up, bias, down, size in maps
        if size or torch.is_grad_enabled()
    ]
    found = torch.zeros_like(x)
    if updates:
        found = found.index_add(0, row, torch.cat(updates))
    return found[:rows]


def _in_few_sizes(x: Tensor, weights: Tensor, opened: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With tokens of zeros that weigh 0, so that each block is opened by a multiple of a 64th of the tokens.

    For each size that it has not met, oneDNN compiles its products in 16 bits anew (benchmarks/gates.md).
    """
    step = max(1, len(x) // 64)
    missing = -opened.sum(0) % step
    added = torch.arange(step - 1)[:, None] < missing
    more = (0, 0, 0, step - 1)
    return functional.pad(x, more), functional.pad(weights, more), torch.cat([opened, added])


def blocks_of_one(x: Tensor, weights: Tensor, opened: Tensor, blocks: Blocks) -> Tensor:
    """The open blocks of a single token, one after the other, without gradients: shapes as above, N = 1."""
    found = torch.zeros_like(x)
    factors = weights[0].tolist()
    for block in opened[0].nonzero()[:, 0].tolist():
        bias = None if blocks.up_bias is None else blocks.up_bias[block]
        hidden = activate(functional.linear(x, blocks.up[block], bias), blocks.activation)
        found.addmm_(hidden, blocks.down[block], alpha=factors[block])
    return found
