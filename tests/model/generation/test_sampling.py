"""Sampling options do what they say: distributions exactly, draws by their frequencies."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.generation.sampling import Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
NOWHERE = torch.zeros(1, 5, dtype=torch.bool)


def chances(logits: Tensor = LOGITS, present: Tensor = NOWHERE, **options: float) -> list[float]:
    return Sampling(**options).probabilities(logits, present)[0].tolist()  # type: ignore[arg-type]


def expected(logits: list[float], kept: Callable[[int], bool] = lambda token: True) -> list[float]:
    weights = [torch.tensor(x).double().exp().item() if kept(token) else 0.0 for token, x in enumerate(logits)]
    return pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)  # type: ignore[return-value]


def test_without_options_it_is_the_softmax() -> None:
    assert chances() == expected([2, 1, 0, -1, -3])


def test_temperature_divides() -> None:
    assert chances(temperature=0.5) == expected([4, 2, 0, -2, -6])
    assert chances(temperature=1e-40) == [1, 0, 0, 0, 0]


def test_top_k_keeps_the_likeliest() -> None:
    assert chances(top_k=2) == expected([2, 1, 0, -1, -3], lambda token: token < 2)
    assert chances(top_k=50) == chances()
    ties = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    assert chances(ties, top_k=2) == expected([1, 0, 1, 1, 0], lambda token: token in (0, 2, 3))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    """0.638, 0.235, 0.086, 0.032, 0.004 for logits 2, 1, 0, -1, -3, here in another order."""
    order = torch.tensor([3, 0, 4, 2, 1])
    for top_p, number in ((0.01, 1), (0.63, 1), (0.65, 2), (0.86, 2), (0.88, 3), (0.999, 5)):
        found = chances(LOGITS[:, order], top_p=top_p)
        assert found == expected([-1, 2, -3, 0, 1], lambda token, n=number: int(order[token]) < n), top_p  # type: ignore[misc]


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert chances(min_p=0.36) == expected([2, 1, 0, -1, -3], lambda token: token < 2)  # e^-1 = 0.368
    assert chances(min_p=0.37) == [1, 0, 0, 0, 0]
    assert chances(min_p=1.0) == [1, 0, 0, 0, 0]


def test_the_penalty_lowers_what_is_there_whatever_its_sign() -> None:
    present = torch.tensor([[True, False, True, True, False]])
    assert chances(present=present, repetition_penalty=2.0) == expected([1, 1, 0, -2, -3])


def test_each_step_works_on_what_the_one_before_leaves() -> None:
    # 0.665 of the three likeliest: enough. Of all five it is 0.638, and a second token would be needed.
    assert chances(top_k=3, top_p=0.66) == [1, 0, 0, 0, 0]
    # At temperature 2 the second has e^-0.5 = 0.61 of the first.
    assert [bool(p) for p in chances(temperature=2.0, min_p=0.5)] == [True, True, False, False, False]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.2, 5),
)
def test_it_is_always_a_distribution_that_keeps_the_likeliest(
    seed: int, temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 10, generator=generator)
    present = torch.rand(3, 10, generator=generator) < 0.3
    sampling = Sampling(penalty, temperature, top_k, top_p, min_p)
    found = sampling.probabilities(logits, present)
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    likeliest = Sampling(penalty, 0.0).draw(logits, present, [None] * 3)
    assert torch.equal(found.gather(1, likeliest[:, None])[:, 0], found.amax(-1))
    drawn = sampling.draw(logits, present, [generator] * 3)
    assert (found.gather(1, drawn[:, None]) > 0).all()


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    """Chi-squared over 20,000 draws, 4 tokens left: above 16.3 once in 1,000 seeds."""
    sampling = Sampling(temperature=1.5, top_k=4)
    chance = sampling.probabilities(LOGITS, NOWHERE)[0]
    generator = torch.Generator().manual_seed(0)
    drawn = sampling.draw(LOGITS.expand(20_000, 5), NOWHERE.expand(20_000, 5), [generator] * 20_000)
    counts = drawn.bincount(minlength=5)
    assert counts[4] == 0
    assert ((counts[:4] - 20_000 * chance[:4]) ** 2 / (20_000 * chance[:4])).sum() < 16.3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        Sampling(**{key: value})  # type: ignore[arg-type]
