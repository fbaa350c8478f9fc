"""AdamW in 8 bits: what its quantisation keeps, and that its update is AdamW's."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.engine import adamw8bit
from pretrain.engine.adamw8bit import BLOCK, LEAST_SCALE, AdamW8bit, dequantise, dynamic_map, quantise

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@st.composite
def moments(draw: st.DrawFn) -> tuple[Tensor, bool]:
    """Any length, magnitudes that fp32 can square, within a block many decades apart, zeros and ties among them."""
    signed = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 3 * BLOCK + 1))
    spread, power = draw(st.sampled_from([0, 1, 4, 12])), draw(st.integers(-46, 18))
    values = torch.randn(n, generator=generator) * 10.0 ** (spread * torch.rand(n, generator=generator) + power)
    values[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    largest = values[values.abs().argmax()].clone()
    values[draw(st.integers(0, n - 1))] = -largest
    return (values if signed else values.abs()), signed


@given(moments())
def test_what_was_dequantised_has_the_same_codes_and_scales_again(moment: tuple[Tensor, bool]) -> None:
    values, signed = moment
    codes, scales = quantise(values, signed)
    again, scales_again = quantise(dequantise(codes, scales, signed)[: len(values)], signed)
    assert torch.equal(codes, again)
    assert torch.equal(scales, scales_again)


@given(moments())
def test_every_value_goes_to_the_nearest_entry_of_the_map(moment: tuple[Tensor, bool]) -> None:
    values, signed = moment
    codes, scales = quantise(values, signed)
    assert codes.shape == (-(-len(values) // BLOCK), BLOCK)
    entries = torch.tensor(dynamic_map(signed), dtype=torch.float64)
    wanted = values.double() / scales.double().repeat_interleave(BLOCK)[: len(values)]
    got = entries[codes.view(-1)[: len(values)].long()]
    nearest = (wanted[:, None] - entries).abs().amin(1)
    assert ((wanted - got).abs() <= nearest + 1e-7 * wanted.abs()).all()
    largest = values.abs().max()
    if largest >= LEAST_SCALE:
        assert dequantise(codes, scales, signed).abs().max() == largest


def test_the_map_is_the_one_of_the_paper_but_for_the_zero_of_the_second_moment() -> None:
    for signed in (True, False):
        entries = dynamic_map(signed)
        assert len(set(entries)) == 256
        assert entries[-1] == 1.0
        assert (0.0 in entries) == signed
        assert all(entry > -1.0 for entry in entries)
    assert min(dynamic_map(signed=False)) == 1e-7
    assert sorted(-entry for entry in dynamic_map(signed=True) if entry < 1.0)[1:] == dynamic_map(signed=True)[1:-1]


@pytest.mark.parametrize("sizes", [(1,), (255, 257, 1000), (adamw8bit.CHUNK * BLOCK + 3,)])
def test_the_first_update_is_adamws_for_any_length(sizes: tuple[int, ...]) -> None:
    """From moments that are zero nothing is lost yet."""
    torch.manual_seed(0)
    start = [torch.randn(size) for size in sizes]
    gradients = [torch.randn(size) for size in sizes]
    results = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(values.clone()) for values in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        kind(parameters, **SETTINGS).step()
        results.append(torch.cat([parameter.detach() for parameter in parameters]))
    ours, theirs = results
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - torch.cat(start)).abs().min() > 1e-3


def test_no_update_grows_where_a_second_moment_is_far_below_its_block() -> None:
    """An entry 0 in the map of the second moment would move the small elements by m / eps."""
    parameter = torch.nn.Parameter(torch.zeros(BLOCK))
    optimizer = AdamW8bit([parameter], **SETTINGS | {"weight_decay": 0.0})
    torch.manual_seed(0)
    magnitudes = torch.logspace(-6, 0, BLOCK)
    for step in range(40):
        before = parameter.detach().clone()
        parameter.grad = magnitudes * torch.randn(BLOCK) * (step % 4 == 0)
        optimizer.step()
        assert (parameter.detach() - before).abs().max() < 10 * SETTINGS["lr"]
