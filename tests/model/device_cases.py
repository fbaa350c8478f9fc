"""What `test_devices.py` runs in a process of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from model.layers.layers import FeedForward
from pretrain.engine.distributed import Ranks
from tests.model.helpers import EVERY, FEEDBACK
from tests.model.situations import SITUATIONS, Made, changed, optional

DEVICE = "absent"
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


def moved(made: Made) -> Made:
    model, batch = made
    for module in model.modules():
        module._parameters |= {
            name: nn.Parameter(there(x), x.requires_grad) for name, x in module._parameters.items() if x is not None
        }
        module._buffers |= {name: there(x) for name, x in module._buffers.items() if x is not None}
    return model, changed(batch, there)


def step(make: Callable[[], Made], mode: FakeTensorMode) -> None:
    made = make()
    with mode:
        model, batch = moved(made)
        weights = {
            tuple(x.shape)
            for name, x in model.named_parameters()
            if x.shape[0] > 1 and x.dim() > 1 and not name.endswith(IN_FP32)
        }
        with Types(weights, model.config.width):
            loss = model(batch).loss
            loss.backward()
        assert loss.device.type == DEVICE
        assert all(x.grad is None or x.grad.device == x.device for x in model.parameters())


def _fewer(name: str) -> dict[str, int]:
    """One layer shows what an option does, unless layers take turns; and feedback goes token by token."""
    layers = {} if name in (*EVERY, "sinks", "strided_alternate") else {"layers": 1}
    return layers | ({"context": 4} if name in FEEDBACK else {})


def steps(ranks: Ranks, names: list[str]) -> dict[str, str]:
    """A step of each, and what was wrong."""
    _setup_privateuseone_for_python_backend(DEVICE)  # for good: so in a process of its own
    found, mode = {}, FakeTensorMode()  # one, since masks are kept
    for name in names:
        try:
            step(partial(SITUATIONS[name], **_fewer(name)), mode)
        except (AssertionError, RuntimeError) as error:
            found[name] = str(error)
    return found


def planted(ranks: Ranks) -> list[str]:
    """What is said of a decoder whose feed forward does what it must not."""
    _setup_privateuseone_for_python_backend(DEVICE)
    plain, found = FeedForward.forward, []

    def elsewhere(self: FeedForward, x: Tensor) -> Tensor:
        return plain(self, x) * torch.ones(x.shape[-1])

    def in_double(self: FeedForward, x: Tensor) -> Tensor:
        return plain(self, x).double().to(x.dtype)

    def copied(self: FeedForward, x: Tensor) -> Tensor:
        return plain(self, x) @ self.down.weight.float().to(x.dtype) @ self.down.weight.T

    for forward in (elsewhere, in_double, copied):
        FeedForward.forward = forward  # type: ignore[method-assign]
        try:
            step(partial(optional, "decoder"), FakeTensorMode())
        except (AssertionError, RuntimeError) as error:
            found.append(str(error))
    return found
