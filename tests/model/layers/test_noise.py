"""The noise: a pure function, uniform, and without memory in any of its arguments."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.layers.noise import at_least, sample_keys, uniform, uniform_at

SHAPE = (40, 25)


def noise(seed: int = 0, step: int = 1, samples: Tensor | None = None, site: int = 0) -> Tensor:
    samples = torch.arange(50) if samples is None else samples
    return uniform(sample_keys(seed, torch.tensor(step), samples), site, SHAPE)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
    samples=st.lists(st.integers(0, 2**50), min_size=1, max_size=6),
    site=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_sample_meets_the_same_noise_wherever_it_stands(
    seed: int, step: int, samples: list[int], site: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(samples))))
    together = noise(seed, step, torch.tensor(samples), site)
    shuffled = noise(seed, step, torch.tensor(samples)[torch.tensor(order)], site)
    assert torch.equal(together[torch.tensor(order)], shuffled)
    assert torch.equal(together[-1:], noise(seed, step, torch.tensor(samples[-1:]), site))
    assert together.min() >= 0.0
    assert together.max() < 1.0


def test_odd_and_shorter_shapes_draw_the_same_numbers() -> None:
    keys = sample_keys(3, torch.tensor(4), torch.arange(2))
    whole = uniform(keys, 1, (7, 3))
    assert torch.equal(uniform(keys, 1, (5, 3)), whole[:, :5])


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1 / 3, 0.5, 0.7, 0.999, 1 - 1e-9])
def test_integers_compare_as_their_numbers_do(rate: float) -> None:
    keys = sample_keys(3, torch.tensor(4), torch.arange(2))
    assert torch.equal(at_least(keys, 1, (701, 73), rate).bool(), uniform(keys, 1, (701, 73)) >= rate)
    edge = uniform(keys, 1, (701, 73))[1, 700, 72].item()
    assert torch.equal(at_least(keys, 1, (701, 73), edge).bool(), uniform(keys, 1, (701, 73)) >= edge)


@pytest.mark.parametrize("width", [3, 4])
def test_chosen_positions_meet_the_numbers_of_the_whole(width: int) -> None:
    keys = sample_keys(3, torch.tensor(4), torch.arange(2))
    whole = uniform(keys, 2**32 - 9, (7, width))
    positions = torch.tensor([[6, 0, 1, 1], [2, 3, 4, 5]])
    for row, chosen in enumerate(positions):
        assert torch.equal(uniform_at(keys, 2**32 - 9, positions, width)[row], whole[row, chosen])


def test_the_numbers_are_those_of_splitmix64() -> None:
    """A run is resumed by later versions and on other devices: another stream would be another run."""
    gamma, ones = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & ones
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & ones
        return z ^ z >> 31

    assert mix(gamma) == 0xE220A8397B1DCDAF  # the first number of the published generator from state 0
    seed, step, sample, site = 2**64 - 5, 567, 2**40 + 3, 2**32 - 9
    key = mix(seed)
    for value in (step, sample, site):
        key = mix((key + value * gamma) & ones)
    drawn = noise(seed, step, torch.tensor([sample]), site).flatten().tolist()
    for element in (0, 1, 2, 517, 999):
        state = mix((key + (element // 2 + 1) * gamma) & ones)
        half = state >> 32 if element % 2 else state & 0xFFFFFFFF
        assert drawn[element] == (half >> 8) / 2**24


def test_uniform_by_chi_square() -> None:
    for part in (noise(), noise(seed=7, site=3), noise(step=9)[..., ::2], noise(samples=torch.arange(0, 5000, 100))):
        counts = torch.histc(part, bins=64, min=0.0, max=1.0)
        expected = part.numel() / 64
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 24 < chi_square < 115  # 63 degrees of freedom, p = 1e-5 on either side


def test_neighbours_are_not_correlated() -> None:
    base = noise()
    pairs = {
        "seed": (base, noise(seed=1)),
        "step": (base, noise(step=2)),
        "site": (base, noise(site=1)),
        "sample": (base[:-1], base[1:]),
        "position": (base[:, :-1], base[:, 1:]),
        "channel": (base[..., :-1], base[..., 1:]),
        "step against sample": (noise(step=1, samples=torch.arange(1, 51)), noise(step=2)),
        "site against sample": (noise(site=0, samples=torch.arange(1, 51)), noise(site=1)),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()
        assert correlation < 5 / a.numel() ** 0.5, name
        assert not torch.equal(a, b), name


def test_no_two_places_share_a_stream() -> None:
    keys = [sample_keys(seed, torch.tensor(step), torch.arange(64)) for seed in range(8) for step in range(64)]
    assert torch.cat(keys).unique().numel() == 8 * 64 * 64
    rows = torch.cat([uniform(keys[0][:4], site, (1, 4)) for site in range(100)]).flatten(1)
    assert all(not torch.equal(a, b) for a, b in pairwise(rows))
