"""Short rows in bf16 on a CPU: products of whole rows in the place of torch's kernel, in training."""

import pytest
import torch
from torch import Tensor

from model.attention import softmax
from model.attention.forms import Kernel

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Query, key and value as views, as a model has them."""
    draw = torch.Generator().manual_seed(queries)

    def view(length: int) -> Tensor:
        return torch.randn(3, length, 4, 16, generator=draw).to(dtype).transpose(1, 2).requires_grad_()

    return view(queries), view(keys), view(keys)


def passed(kernel: Kernel, given: Inputs, mask: Tensor | None, causal: bool) -> list[Tensor]:
    """The result, and the gradients of a fixed weighing of it."""
    found = kernel(*given, mask, causal)
    weighing = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape).to(found.dtype)
    return [found, *torch.autograd.grad(found, given, weighing)]


@pytest.mark.parametrize(("queries", "keys"), [(1, 16), (16, 16), (40, 100), (128, 128)])
@pytest.mark.parametrize("seen", ["all", "causal", "each row's own", "each head's own"])
def test_it_is_as_exact_as_the_kernel(queries: int, keys: int, seen: str) -> None:
    mask = None
    if seen.startswith("each"):
        shape = (3, 1 if "row" in seen else 4, queries, keys)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[..., 0] = True
    given, causal = inputs(queries, keys), seen == "causal"
    query, key, value = given
    exact = passed(softmax._kernel, (query.double(), key.double(), value.double()), mask, causal)
    ours, kernels = passed(softmax.plain, given, mask, causal), passed(softmax._kernel, given, mask, causal)
    for mine, theirs, right in zip(ours, kernels, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() <= 1.5 * (theirs - right).norm() + 1e-3 * right.norm()


def test_it_is_taken_where_it_is_faster_alone() -> None:
    def taken(given: Inputs) -> bool:
        return "WholeRows" in str(softmax.plain(*given, None, True).grad_fn)

    few, many = softmax.SHORT_ROWS
    assert taken(inputs(few, few)) and taken(inputs(many, many))
    assert not taken(inputs(few, few - 1)) and not taken(inputs(many, many + 1))
    assert not taken(inputs(few, few, torch.float32))
    with torch.no_grad():
        assert not taken(inputs(few, few))


@pytest.mark.parametrize("causal", [True, False])
def test_it_keeps_no_more_than_the_kernel(causal: bool) -> None:
    mask = None if causal else torch.rand(1, 1, 128, 128) < 0.9

    def kept(kernel: Kernel) -> int:
        storages = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = kernel(*inputs(128, 128), mask, causal)
        assert found.grad_fn is not None
        return sum(storages.values())

    assert kept(softmax.plain) <= kept(softmax._kernel)
