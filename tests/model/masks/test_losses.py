"""Penalties and their schedule."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config.mask_config import EntropyConfig, L1Config
from model.masks.penalties import entropy, l1, weight_at

KINDS: tuple[Literal["shannon", "complement", "binary"], ...] = ("shannon", "complement", "binary")


def test_entropy_has_its_peak_where_it_should() -> None:
    def of(m: float, kind: Any) -> float:
        return entropy(torch.tensor([m]), kind).item()

    assert of(1 / math.e, "shannon") == pytest.approx(math.log2(math.e) / math.e)
    assert of(1 - 1 / math.e, "complement") == pytest.approx(math.log2(math.e) / math.e)
    assert of(0.5, "binary") == pytest.approx(1.0)
    assert of(0.25, "binary") == pytest.approx(of(0.25, "shannon") + of(0.25, "complement"))


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_and_its_gradient_are_finite_at_the_ends(kind: Any) -> None:
    angle = torch.tensor([0.0, math.pi, 1.0], requires_grad=True)
    mask = angle.cos() * 0.5 + 0.5
    value = entropy(mask, kind) + l1(mask, "linear") + l1(mask, "squared")
    value.backward()
    assert value.isfinite()
    assert angle.grad is not None
    assert angle.grad.isfinite().all()
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    gradients = torch.autograd.grad(entropy(ends, kind), ends)[0]
    assert gradients.isfinite().all()
    assert entropy(ends, kind) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_entropy_is_that_of_its_formula(kind: Any) -> None:
    inner = torch.linspace(1e-3, 1 - 1e-3, 99, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: entropy(m, kind), inner)
    outside = torch.tensor([0.0, 1e-7, 1 - 1e-7, 1.0], dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(entropy(outside, kind), outside)[0].any()


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=20))
def test_penalties_are_means_over_elements(values: list[float]) -> None:
    mask = torch.tensor(values)
    assert l1(mask, "linear").item() == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert l1(mask, "squared").item() == pytest.approx(sum(v * v for v in values) / 2 / len(values), abs=1e-6)
    for kind in KINDS:
        torch.testing.assert_close(entropy(mask.repeat(3), kind), entropy(mask, kind))
        assert 0.0 <= entropy(mask, kind) <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("penalty", "step", "expected"),
    [
        (L1Config(weight=0.3), 1, 0.3),
        (L1Config(weight=0.3, start_step=10), 9, 0.0),
        (L1Config(weight=0.3, start_step=10), 10, 0.3),
        (EntropyConfig(weight=0.4, start_step=10, ramp_steps=4), 10, 0.0),
        (EntropyConfig(weight=0.4, start_step=10, ramp_steps=4), 11, 0.1),
        (EntropyConfig(weight=0.4, start_step=10, ramp_steps=4), 14, 0.4),
        (EntropyConfig(weight=0.4, start_step=10, ramp_steps=4), 10**6, 0.4),
    ],
)
def test_schedule(penalty: EntropyConfig | L1Config, step: int, expected: float) -> None:
    weight = weight_at(torch.tensor(step), penalty)
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(expected)
