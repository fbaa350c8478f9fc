"""alpha-entmax against what defines it, and its gradients against differences."""

import pytest
import torch
from torch import Tensor

from model.layers.entmax import entmax

ALPHAS = [1.01, 1.2, 1.5, 1.8, 2.0]


def scores(*shape: int, std: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = std * torch.randn(*shape, generator=generator, dtype=torch.float64)
    made[..., 1, -2:] = -torch.inf  # masked
    return made


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_is_what_its_conditions_say(alpha: float, learned: bool) -> None:
    """p^(alpha-1) = (alpha-1) z - tau on the support, 0 >= that off it, and a sum of 1: there is one such p."""
    z = scores(3, 5, 9)
    p = entmax(z, torch.tensor(alpha, dtype=torch.float64) if learned else alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 5, dtype=torch.float64))
    x, inside = (alpha - 1) * z, p > 0
    tau = torch.where(inside, x - p ** (alpha - 1), torch.nan)
    mean = tau.nanmean(-1, keepdim=True)
    assert torch.where(inside, (tau - mean).abs(), 0.0).max() < 1e-9
    assert (x <= mean + 1e-9)[~inside].all()
    assert (p[..., 1, -2:] == 0).all()
    assert ((p == 0).sum() > 6 + 15) == (alpha > 1.1)


def test_in_fp32_it_is_what_it_is_in_float64() -> None:
    z = scores(4, 7, 40)
    for alpha in ALPHAS:
        for given in (alpha, torch.tensor(alpha)):
            torch.testing.assert_close(entmax(z.float(), given).double(), entmax(z, alpha), rtol=1e-4, atol=1e-6)


def test_a_few_steps_are_enough_for_the_slowest_rows() -> None:
    """Of 4,096 scores that come ever closer to the threshold."""
    i = torch.arange(4096.0, dtype=torch.float64)
    rows = torch.stack([-((i / 4096) ** 0.2), -torch.log1p(i) / 50, (1 + i) ** -0.5, 0.99**i, -0.999 * (i > 0)])
    for alpha in (1.5, 1.9, 1.99, 2.0):
        p = entmax(rows / (alpha - 1), alpha)
        tau = torch.where(p > 0, rows - p ** (alpha - 1), torch.nan)
        assert torch.where(p > 0, (tau - tau.nanmean(-1, keepdim=True)).abs(), 0.0).max() < 1e-9


def test_near_1_it_is_a_softmax() -> None:
    z = scores(3, 5, 32)
    assert (entmax(z, 1.01) - z.softmax(-1)).abs().max() < 0.02
    assert (entmax(z, 1.1) - z.softmax(-1)).abs().max() > 0.05


def test_the_closed_form_of_two_scores() -> None:
    """Sparsemax of (z, 0) is (z + 1) / 2, from 0 to 1."""
    z = torch.tensor([-3.0, -0.5, 0.0, 0.25, 1.0, 9.0], dtype=torch.float64)
    pairs = torch.stack([z, torch.zeros_like(z)], dim=-1)
    torch.testing.assert_close(entmax(pairs, 2.0)[:, 0], ((z + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("alphas", [[1.2, 1.5, 1.8, 2.0], 1.5, 2.0, 1.3], ids=str)
def test_gradients_of_scores_and_alpha(alphas: list[float] | float) -> None:
    z = scores(3, 4, 7, std=1.0)
    z = z.nan_to_num(neginf=-40.0).requires_grad_()
    if isinstance(alphas, float):
        assert torch.autograd.gradcheck(lambda z: entmax(z, alphas), (z,), atol=1e-5)
        return
    learned = torch.tensor(alphas, dtype=torch.float64).view(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(entmax, (z, learned), atol=1e-5)
