"""Positions without parameters."""

import pytest
import torch

from model.layers.positions import rotate, sinusoid
from tests.model.helpers import build, small

POSITIONS = torch.arange(40)


def test_products_of_sines_depend_on_the_distance_only() -> None:
    table = sinusoid(POSITIONS, 16)
    products = table @ table.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert products[0, 1] != products[0, 7]
    assert table[0].tolist() == [0.0, 1.0] * 8
    assert table[3, 2].item() == pytest.approx(torch.tensor(3 / 10_000 ** (2 / 16)).sin().item())
    assert sinusoid(POSITIONS, 7).shape == (40, 7)


def test_products_of_rotated_vectors_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).unbind()
    products = (
        rotate(query.expand(1, 40, 1, 8), POSITIONS)[0, :, 0] @ rotate(key.expand(1, 40, 1, 8), POSITIONS)[0, :, 0].T
    )
    for distance in (-5, 0, 1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert (products[0, 1] - products[0, 7]).abs() > 1e-3


def test_a_rotation_keeps_lengths_and_types() -> None:
    x = torch.randn(2, 40, 3, 8)
    torch.testing.assert_close(rotate(x, POSITIONS).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, POSITIONS)[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), POSITIONS).dtype == torch.bfloat16


def test_sines_start_as_large_as_a_learned_table() -> None:
    model = build(small(positions="sinusoidal", width=64, heads=4))
    vectors = model.with_positions(torch.zeros(1, 12, 64))[0]
    assert vectors.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_order_matters(positions: str) -> None:
    model = build(small("decoder_only", positions=positions, layers=1)).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5], [1, 3, 1, 4, 5]])
    first, second = model.logits(ids)[:, -1]
    assert (first - second).abs().max() > 1e-7
