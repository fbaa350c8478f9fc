"""Nothing is made on the wrong device, in double precision, or as a copy of a weight in fp32: seen without a GPU.

Parameters, buffers and batch are fake tensors (shapes and types without numbers) of a device that is not there. To make
another tensor on the CPU and compute with both fails, as it would on a GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from model.layers.layers import FeedForward
from tests.model.helpers import EVERY, batch_of, build, variant

DEVICE = "absent"
_setup_privateuseone_for_python_backend(DEVICE)
IN_FP32 = ".gate"
"""The weights that are to be: gates of blocks, a row each."""
COPY = torch.ops.aten._to_copy.default


class Types(TorchDispatchMode):
    """Fails at a tensor in double precision, counts and moments aside, and at a copy of a weight in fp32."""

    def __init__(self, weights: set[tuple[int, ...]], width: int) -> None:
        super().__init__()
        self._width = width
        self._weights = weights

    def _is_double(self, found: Tensor) -> bool:
        return found.dtype == torch.float64 and found.dim() > 1 and found.shape[-1] != self._width + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            assert not self._is_double(found), f"{func} is in double precision"
            if func is COPY and args[0].dtype == torch.bfloat16 and found.dtype == torch.float32:
                assert tuple(found.shape) not in self._weights, f"a weight {[*found.shape]} is copied to fp32"
        return found


def there(tensor: Tensor) -> Tensor:
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=DEVICE)


def moved(config: Any) -> tuple[nn.Module, Any]:
    model, batch = build(config), batch_of(config)
    for module in model.modules():
        module._parameters |= {name: nn.Parameter(there(x)) for name, x in module._parameters.items() if x is not None}
        module._buffers |= {name: there(x) for name, x in module._buffers.items() if x is not None}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        fields[field.name] = there(value) if isinstance(value, Tensor) else value
    return model, type(batch)(**fields)


def step(config: Any) -> None:
    with FakeTensorMode():
        model, batch = moved(config)
        weights = {
            tuple(x.shape)
            for name, x in model.named_parameters()
            if x.shape[0] > 1 and x.dim() > 1 and not name.endswith(IN_FP32)
        }
        with Types(weights, config.width):
            loss = model(batch).loss
            loss.backward()
        assert loss.device.type == DEVICE
        assert all(x.grad is None or x.grad.device == x.device for x in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_a_step_makes_nothing_on_another_device_and_in_no_other_type(name: str) -> None:
    step(variant(name))


def test_the_check_catches_what_is_made_elsewhere_or_in_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(ff: Callable[[FeedForward, Tensor], Tensor]) -> None:
        monkeypatch.setattr(FeedForward, "forward", ff)
        step(variant("decoder"))

    plain = FeedForward.forward
    with pytest.raises(RuntimeError, match="same device"):
        planted(lambda self, x: plain(self, x) * torch.ones(x.shape[-1]))
    with pytest.raises(AssertionError, match="double precision"):
        planted(lambda self, x: plain(self, x).double().to(x.dtype))
    with pytest.raises(AssertionError, match="is copied to fp32"):
        planted(lambda self, x: (plain(self, x) @ self.down.weight.float().to(x.dtype)) @ self.down.weight.T)
