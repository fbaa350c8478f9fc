"""AdamW that keeps its moments in 8 bits, by blocks: "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.

Two things differ from the paper, and from the libraries:

- The scale of a block is its largest element with the sign it has, so that one always is at the 1 at the end of the
  dynamic map. Quantising what was dequantised then gives the same codes and scales, bit for bit: a checkpoint can hold
  the moments in fp32 and yet give them back exactly, as long as the blocks are the same.
- The map of the second moment has no 0. An element whose second moment were rounded to 0, and its first one not, would
  be moved by m / eps.
"""

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Elements that share a scale."""
CHUNK = 2**14
"""Blocks that are updated at once: 16 MiB for each temporary tensor in fp32."""
LEAST_SCALE = 1e-30
"""Blocks of smaller elements have this scale: none is 0, and no product of it with the map is a denormal number."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they can be negative."""


class AdamW8bit(torch.optim.Optimizer):
    """torch's AdamW with the moments of each flat fp32 parameter in 8 bits; an update is computed in fp32.

    Of each parameter [n] it keeps, beside `step` (0-d), for each moment its codes [blocks, 256] (uint8) and its scales
    [blocks] (fp32, `_scale` after the name): 2.03 bytes an element, where AdamW keeps 8.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(new_state(parameter))
                    state["step"] += 1
                    _update(parameter.view(-1), parameter.grad.reshape(-1), state, group)

    def unpack(self) -> dict[Tensor, dict[str, Tensor]]:
        """Copies of the moments by parameter: fp32 [n], on the host."""
        unpacked: dict[Tensor, dict[str, Tensor]] = {}
        for parameter, state in self.state.items():
            moments = {name: torch.empty(parameter.numel()) for name in SIGNED}
            for name, moment in moments.items():
                for part, codes, scales in _chunks(moment, state, name):
                    part.copy_(dequantise(codes, scales, SIGNED[name])[: part.numel()])
            unpacked[parameter] = moments
        return unpacked

    def pack(self, unpacked: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over what was written into `unpack`'s copies."""
        for parameter, moments in unpacked.items():
            for name, moment in moments.items():
                for part, codes, scales in _chunks(moment, self.state[parameter], name):
                    _store(part.to(codes.device), codes, scales, SIGNED[name])


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """What is kept of a parameter before its first update."""
    blocks, device = math.ceil(parameter.numel() / BLOCK), parameter.device
    state = {"step": torch.tensor(0.0)}
    for name, signed in SIGNED.items():
        codes, scale = quantise(torch.zeros(BLOCK, device=device), signed)
        state[name], state[f"{name}_scale"] = codes.repeat(blocks, 1), scale.repeat(blocks)
    return state


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest entries of the dynamic map, of blocks that are scaled to reach 1; the last one is padded with zeros.

    Args:
        values: fp32 [n]; not negative unless `signed`.

    Returns:
        codes [blocks, 256] (uint8) and scales [blocks] (fp32).
    """
    blocks = pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    low, high = blocks.amin(1), blocks.amax(1)
    scales = torch.where(high >= -low, high, low)
    scales = torch.where(scales.abs() < LEAST_SCALE, LEAST_SCALE, scales)
    _, bounds = _table(signed, values.device)
    return torch.bucketize(blocks / scales[:, None], bounds, out_int32=True).to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values [blocks · 256] (fp32) that codes [blocks, 256] and scales [blocks] stand for."""
    table, _ = _table(signed, codes.device)
    return (table[codes.int()] * scales[:, None]).view(-1)


def dynamic_map(signed: bool) -> list[float]:
    """The 256 values in [-1, 1] or (0, 1], ascending: seven decades, each with twice the entries of the one below."""
    entries = [1.0, 0.0 if signed else 1e-7]
    for decade in range(7):
        size = 2 ** (decade if signed else decade + 1)
        means = [10.0 ** (decade - 6) * (0.1 + 0.9 * (index + 0.5) / size) for index in range(size)]
        entries += [*means, *(-mean for mean in means)] if signed else means
    return sorted(entries)


@cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The dynamic map [256], and the bounds [255] halfway between its entries."""
    table = torch.tensor(dynamic_map(signed), dtype=torch.float64)
    return table.float().to(device), ((table[1:] + table[:-1]) / 2).float().to(device)


def _chunks(flat: Tensor, state: Mapping[str, Tensor], name: str) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Of a tensor [n] its parts, and the codes and scales of a moment that belong to them."""
    scales = state[f"{name}_scale"]
    return zip(flat.split(CHUNK * BLOCK), state[name].split(CHUNK), scales.split(CHUNK), strict=True)


def _store(moment: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    new_codes, new_scales = quantise(moment, signed)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def _update(parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """As torch's AdamW, a chunk at a time."""
    lr, (beta_1, beta_2), steps = group["lr"], group["betas"], float(state["step"])
    size, root_2 = lr / (1 - beta_1**steps), (1 - beta_2**steps) ** 0.5
    firsts, seconds = (_chunks(parameter, state, name) for name in SIGNED)
    gradients = gradient.split(CHUNK * BLOCK)
    for (theta, m_codes, m_scales), (_, v_codes, v_scales), g in zip(firsts, seconds, gradients, strict=True):
        m = dequantise(m_codes, m_scales, signed=True)[: g.numel()].lerp_(g, 1 - beta_1)
        v = dequantise(v_codes, v_scales, signed=False)[: g.numel()].mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
        theta.mul_(1 - lr * group["weight_decay"])
        theta.addcdiv_(m, v.sqrt().div_(root_2).add_(group["eps"]), value=-size)
        _store(m, m_codes, m_scales, signed=True)
        _store(v, v_codes, v_scales, signed=False)
