"""The mask: its roundings, its gradients, its statistics."""

import pytest
import torch
from torch import Tensor

from model import learned_dropout
from model.config import Architecture, L1Config, LearnedDropoutConfig
from model.learned_dropout import LearnedDropout, cosine_mask, straight_through
from model.noise import sample_keys, uniform
from tests.model.helpers import ARCHITECTURES, batch_of, build, open_masks, small

KEYS = sample_keys(0, torch.tensor(1), torch.arange(3))


def test_straight_through_keeps_with_probability_m_and_has_gradient_one() -> None:
    mask = torch.linspace(0, 1, 11).expand(200, 40, 11).contiguous().requires_grad_()
    kept = straight_through(mask, uniform(torch.arange(200), 0, (40, 11)))
    kept.sum().backward()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert mask.grad is not None
    assert torch.equal(mask.grad, torch.ones_like(mask))
    shares = kept.detach().mean(dim=(0, 1))
    assert (shares - torch.linspace(0, 1, 11)).abs().max() < 4 * (0.25 / 8000) ** 0.5
    assert shares[0] == 0.0
    assert shares[-1] == 1.0


def test_shift_alone_sets_the_mask_at_the_start() -> None:
    module = LearnedDropout(small(), "dec_ff", 0)
    torch.nn.init.zeros_(module.qkv.weight)
    _, statistics = module(torch.randn(3, 12, 16), KEYS)
    expected = 0.5 * torch.tensor(0.5).cos() + 0.5
    torch.testing.assert_close(statistics["dec_ff/00"].mask_mean, expected)
    torch.testing.assert_close(statistics["dec_ff/00"].mask_slope, 0.5 * torch.tensor(0.5).sin())


@pytest.mark.parametrize(
    ("rounding", "eval_rounding", "keys"),
    [
        ("noise_ste", "none", KEYS),
        ("none", "threshold", KEYS),
        ("noise_ste", "threshold", None),
        ("none", "none", None),
    ],
)
def test_roundings(rounding: str, eval_rounding: str, keys: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = LearnedDropoutConfig.model_validate({"rounding": rounding, "eval_rounding": eval_rounding})
    module = LearnedDropout(small(learned_dropout=dropout), "dec_ff", 0)
    mask = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(learned_dropout, "cosine_mask", lambda angle: mask)
    x = torch.ones(3, 12, 16)
    used, statistics = module(x, keys)
    active = rounding if keys is not None else eval_rounding
    if active == "none":
        assert torch.equal(used, mask)
    elif active == "threshold":
        assert torch.equal(used, (mask >= 0.5).float())
    else:
        assert set(used.unique().tolist()) == {0.0, 1.0}
    found = statistics["dec_ff/00"]
    assert found.density == (used > 0).float().mean()
    assert found.mask_near_zero == (mask < 0.1).float().mean()
    assert found.mask_near_one == (mask > 0.9).float().mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mask_gradients_survive_bf16_weights(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def kept(angle: Tensor) -> Tensor:
        assert angle.dtype == torch.float32
        mask = cosine_mask(angle)
        mask.retain_grad()
        masks.append(mask)
        return mask

    monkeypatch.setattr(learned_dropout, "cosine_mask", kept)
    # Without penalties, whose gradient is never 0: only what comes through the output counts.
    dropout = LearnedDropoutConfig(l1=L1Config(weight=0.0))
    config = small(architecture, width=32, learned_dropout=dropout)
    model = build(config).bfloat16()
    (model(batch_of(config)).loss / 160_000).backward()  # the share of one token in a batch of that many
    assert len(masks) == len(config.dropout_sites) * config.layers
    for mask in masks:
        assert mask.grad is not None
        assert (mask.grad != 0).float().mean() > 0.99


def test_a_site_has_the_same_noise_whatever_other_sites_there_are() -> None:
    both = LearnedDropout(small(), "dec_ff", 1)
    alone = LearnedDropout(small(learned_dropout=LearnedDropoutConfig(sites=["dec_ff"])), "dec_ff", 1)
    alone.load_state_dict(both.state_dict())
    x = torch.randn(3, 12, 16)
    assert torch.equal(both(x, KEYS)[0], alone(x, KEYS)[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_is_deterministic_and_has_no_penalty(architecture: Architecture) -> None:
    config = small(architecture)
    model = open_masks(build(config)).eval()
    first, later = model(batch_of(config, step=5)), model(batch_of(config, step=5000))
    assert torch.equal(first.loss, later.loss)
    assert first.loss == first.metrics["cross_entropy"] == first.metrics["loss"]
    assert later.metrics["entropy_weight"] > 0


def test_training_adds_the_weighted_penalties_averaged_over_masks() -> None:
    config = small()
    output = open_masks(build(config))(batch_of(config, step=1500))
    metrics = output.metrics
    expected = metrics["cross_entropy"] + 0.01 * metrics["entropy"] + 0.01 * metrics["l1"]
    torch.testing.assert_close(output.loss.detach(), expected)
    sites = [value for name, value in metrics.items() if name.startswith("density/")]
    assert {name for name in metrics if "/" in name} == {
        f"{kind}/{s}_ff/0{n}" for kind in ("density", "entropy") for s in ("enc", "dec") for n in (0, 1)
    }
    torch.testing.assert_close(torch.stack(sites).mean(), metrics["density"])
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
