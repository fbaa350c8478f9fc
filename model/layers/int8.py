"""Linear maps in 8 bits: each row of a matrix is whole numbers of -127 to 127 times a scale of its own."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SCALE = "scale"
"""Last name of what a map has beside its weight."""


def in_int8(tensors: Mapping[str, Tensor], maps: Iterable[str]) -> dict[str, Tensor]:
    """The weights [outputs, inputs] of the maps of these names in int8, scales [outputs] in fp32 beside them."""
    found = dict(tensors)
    for name in maps:
        weight = found[f"{name}.weight"].float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        found[f"{name}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
        found[f"{name}.{SCALE}"] = scale
    return found


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `in_int8` was given, each weight within half a scale; others as they are."""
    found = dict(tensors)
    for name in maps_of(tensors):
        scale = found.pop(f"{name}.{SCALE}")
        found[f"{name}.weight"] = found[f"{name}.weight"].float() * scale[:, None]
    return found


def maps_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the maps that are in int8."""
    ends = (name.rpartition(".") for name in tensors)
    return [name for name, _, last in ends if last == "weight" and tensors[f"{name}.weight"].dtype == torch.int8]


class Int8Map(nn.Module):
    """Where weights in int8 are read to, before `restore` makes a linear map of it."""

    weight: Tensor
    scale: Tensor

    def __init__(self, base: nn.Linear) -> None:
        """Buffers of the shapes of a map."""
        super().__init__()
        self.bias = base.bias
        self.register_buffer("weight", torch.empty_like(base.weight, dtype=torch.int8))
        self.register_buffer(SCALE, torch.empty(len(base.weight), device=base.weight.device))

    def restore(self, dtype: torch.dtype) -> nn.Linear:
        """The map, in a type of numbers that is computed in."""
        outputs, inputs = self.weight.shape
        found = nn.Linear(inputs, outputs, bias=False, device="meta")
        found.weight = nn.Parameter((self.weight.float() * self.scale.float()[:, None]).to(dtype))
        found.bias = self.bias
        return found
