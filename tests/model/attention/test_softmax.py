"""Attention in bf16 on a CPU: the values are torch's own, and the gradients of short rows are nearer to the truth."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.attention import softmax

ROWS, HEADS, QUERIES, KEYS, CHANNELS = 3, 2, 33, 40, 16


def gradients(found: Tensor, vectors: list[Tensor]) -> Tensor:
    """Of a sum of the results that weighs each differently."""
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    return torch.cat([x.flatten() for x in torch.autograd.grad((found * weights).sum(), vectors)]).double()


@pytest.mark.parametrize("sees", ["causal", "all", "mask"])
def test_short_rows_have_the_values_of_torch_and_better_gradients(sees: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (KEYS if sees == "causal" else QUERIES, KEYS, KEYS)
    query, key, value = vectors = [
        torch.randn(ROWS, HEADS, n, CHANNELS, generator=generator).bfloat16().requires_grad_() for n in lengths
    ]
    mask = None
    if sees == "mask":
        mask = torch.rand(ROWS, 1, QUERIES, KEYS, generator=generator) < 0.5
        mask[..., 0] = True
    attend = partial(functional.scaled_dot_product_attention, attn_mask=mask, is_causal=sees == "causal")
    expected = attend(query, key, value)
    found = softmax.plain(query, key, value, mask, sees == "causal")
    assert torch.equal(found, expected)
    exact = [x.detach().double().requires_grad_() for x in vectors]
    true = gradients(attend(*exact), exact)
    theirs = gradients(expected, vectors)
    assert (gradients(found, vectors) - true).norm() < 0.8 * (theirs - true).norm()

    monkeypatch.setattr(softmax, "SHORT", KEYS - 1)
    assert torch.equal(gradients(softmax.plain(query, key, value, mask, sees == "causal"), vectors), theirs)
