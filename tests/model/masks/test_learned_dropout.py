"""The mask: its roundings, its gradients, its statistics."""

import pytest
import torch
from torch import Tensor

from model.attention.visibility import Visible
from model.config.mask_config import LearnedDropoutConfig
from model.layers.noise import sample_keys, uniform
from model.masks import learned_dropout
from model.masks.learned_dropout import LearnedDropout, cosine_mask, straight_through
from model.masks.site import SiteDropout
from model.masks.telemetry import mask_statistics, told
from tests.model.helpers import NAMED, batch_of, build, open_masks, small, variant

KINDS = (
    *("entropy", "l1", "mask_slope", "density", "mask_mean", "mask_near_zero", "mask_near_one"),
    *("always_on", "always_off"),
)
KEYS = sample_keys(0, torch.tensor(1), torch.arange(3))


def test_noise_keeps_with_probability_m() -> None:
    mask = torch.linspace(0, 1, 11).expand(200, 40, 11)
    kept = (uniform(torch.arange(200), 0, (40, 11)) < mask).float()
    shares = kept.mean(dim=(0, 1))
    assert (shares - torch.linspace(0, 1, 11)).abs().max() < 4 * (0.25 / 8000) ** 0.5
    assert shares[0] == 0.0
    assert shares[-1] == 1.0


def test_shift_alone_sets_the_mask_at_the_start() -> None:
    module = LearnedDropout(small(), "dec_ff", 0)
    torch.nn.init.zeros_(module.qkv.weight)
    _, statistics = module(torch.randn(3, 12, 16), KEYS)
    expected = 0.5 * torch.tensor(0.5).cos() + 0.5
    torch.testing.assert_close(statistics["dec_ff/00"]["mask_mean"], expected)
    torch.testing.assert_close(statistics["dec_ff/00"]["mask_slope"], 0.5 * torch.tensor(0.5).sin())


def rounded(mask: Tensor, keys: Tensor | None, monkeypatch: pytest.MonkeyPatch, **config: str) -> Tensor:
    """What learned dropout leaves of ones under a given mask [3, 12, 16]."""
    module = LearnedDropout(small(learned_dropout=config), "dec_ff", 0)
    monkeypatch.setattr(learned_dropout, "cosine_mask", lambda angle: mask)
    used, statistics = module(torch.ones(3, 12, 16), keys)
    found = statistics["dec_ff/00"]
    assert found["density"] == (used >= 0.5).float().mean()
    assert found["mask_near_zero"] == (mask < 0.1).float().mean()
    assert found["mask_near_one"] == (mask > 0.9).float().mean()
    return used


@pytest.mark.parametrize(
    ("rounding", "slope"),
    [("none", 1.0), ("sigmoid", None), ("sigmoid_ste", 1.0), ("noise_ste", 1.0), ("threshold_ste", 1.0)],
)
def test_roundings_of_training(rounding: str, slope: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    used = rounded(mask, KEYS, monkeypatch, rounding=rounding)
    soft = torch.sigmoid(60 * (mask - 0.5))
    expected = {"none": mask, "threshold_ste": (mask >= 0.5).float(), "sigmoid": soft, "sigmoid_ste": soft}
    if rounding in expected:
        torch.testing.assert_close(used, expected[rounding])
    else:
        assert set(used.unique().tolist()) == {0.0, 1.0}
        assert used.mean().item() == pytest.approx(mask.mean().item(), abs=0.05)
    used.sum().backward()
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad, torch.ones_like(mask) * slope if slope else (60 * soft * (1 - soft)).detach())


def test_roundings_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.rand(1, 12, 16, generator=torch.Generator().manual_seed(0))
    mask = row.expand(3, 12, 16)
    assert torch.equal(rounded(mask, None, monkeypatch, eval_rounding="none"), mask)
    assert torch.equal(rounded(mask, None, monkeypatch, eval_rounding="threshold"), (mask >= 0.5).float())
    drawn = rounded(mask, None, monkeypatch, eval_rounding="sample")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(mask.mean().item(), abs=0.1)
    assert torch.equal(drawn, drawn[:1].expand(3, 12, 16))  # the draw knows positions, not sequences
    assert not torch.equal(drawn, rounded(mask, None, monkeypatch, eval_rounding="sample", eval_seed=1))  # type: ignore[arg-type]


def test_straight_through_takes_values_from_one_and_gradients_from_the_other() -> None:
    values, mask = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)
    used = straight_through(values, mask)
    used.sum().backward()
    torch.testing.assert_close(used, values)
    assert values.grad is None
    assert mask.grad is not None
    assert torch.equal(mask.grad, torch.ones(5))


def test_statistics_of_a_mask() -> None:
    mask = torch.tensor([0.05, 0.95, 0.5, 0.5]).expand(2, 3, 4)
    kept = torch.tensor([[False, True, True, False]]).repeat(2, 3, 1)
    kept[1, 2, 2] = False
    expected = {
        "density": 11 / 24,
        "mask_mean": 0.5,
        "mask_near_zero": 0.25,
        "mask_near_one": 0.25,
        "always_on": 1.0,
        "always_off": 2.0,
    }
    alone, longer = mask_statistics(mask, kept), torch.cat([kept, ~kept[:, :1]], 1)
    padding = torch.zeros(2, 4, dtype=torch.bool).index_fill(1, torch.tensor(3), True)
    padded = mask_statistics(torch.cat([mask, mask[:, :1] ** 2], 1), longer, Visible(padding=padding))
    for found in (alone, padded):
        named = {f"{name}/x" if name == "kept" else name: value for name, value in found.items()}
        numbers = {name: value.item() for name, value in told(named).items() if "/" not in name}
        assert numbers == pytest.approx(expected)


@pytest.mark.parametrize("source", ["attention", "embed", "low_rank", "elementwise"])
def test_what_the_mask_comes_from(source: str) -> None:
    config = small(learned_dropout={"source": source, "eval_rounding": "none"})
    module = LearnedDropout(config, "dec_ff", 0)
    x, other = torch.randn(3, 12, 16), torch.randn(3, 12, 16)
    used = module(x, None, other)[0]
    assert torch.equal(used, module(x, None, -other)[0]) == (source != "embed")
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    weights: dict[str, dict[str, tuple[int, ...]]] = {
        "elementwise": {"scale": (16,)},
        "low_rank": {"down.weight": (4, 16), "up.weight": (16, 4)},
    }
    assert shapes == weights.get(source, {"qkv.weight": (48, 16)}) | {"shift": (16,)}


@pytest.mark.parametrize(
    "name",
    [
        *("parallel", "decoder", "serial", "layer_input", "cross_first", "next_position", "encoder_loss", "modern"),
        *("modern_serial", "modern_decoder", "post_norm", "everywhere", "everywhere_embed", "everywhere_elementwise"),
        *("everywhere_decoder", "sigmoid_ste", "unrounded"),
    ],
)
def test_mask_gradients_survive_bf16_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def kept(angle: Tensor) -> Tensor:
        assert angle.dtype == torch.float32
        mask = cosine_mask(angle)
        mask.retain_grad()
        masks.append(mask)
        return mask

    monkeypatch.setattr(learned_dropout, "cosine_mask", kept)
    # Without penalties, whose gradient is never 0: only what comes through the output counts.
    masks_of = NAMED[name].get("learned_dropout", {})
    config = variant(name, width=32, learned_dropout=masks_of | {"l1": {"weight": 0.0}})
    model = build(config).bfloat16()
    (model(batch_of(config)).loss / 160_000).backward()  # the share of one token in a batch of that many
    assert len(masks) == config.num_masks(config.dropout_sites)
    for mask in masks:
        assert mask.grad is not None
        assert (mask.grad != 0).float().mean() > 0.99


def test_a_site_has_the_same_noise_whatever_other_sites_there_are() -> None:
    both = LearnedDropout(small(), "dec_ff", 1)
    alone = LearnedDropout(small(learned_dropout=LearnedDropoutConfig(sites=["dec_ff"])), "dec_ff", 1)
    alone.load_state_dict(both.state_dict())
    x = torch.randn(3, 12, 16)
    assert torch.equal(both(x, KEYS)[0], alone(x, KEYS)[0])


def test_training_adds_the_weighted_penalties_averaged_over_masks() -> None:
    config = small()
    output = open_masks(build(config))(batch_of(config, step=1500))
    metrics = told(output.metrics)
    expected = metrics["cross_entropy"] + 0.01 * metrics["entropy"] + 0.01 * metrics["l1"]
    torch.testing.assert_close(output.loss.detach(), expected)
    sites = [value for name, value in metrics.items() if name.startswith("density/")]
    assert {name for name in metrics if "/" in name} == {
        f"{kind}/{s}_ff/0{n}" for kind in KINDS for s in ("enc", "dec") for n in (0, 1)
    }
    torch.testing.assert_close(torch.stack(sites).mean(), metrics["density"])
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_every_site_has_a_mask_of_its_own() -> None:
    config = variant("everywhere", layers=3, cross_source="layer_input")
    model = build(config)
    names = {name for name in model(batch_of(config)).metrics if name.startswith("density/")}
    enc = {f"density/enc_{part}/{n:02d}" for part in ("sa", "ff") for n in range(2)}
    dec = {f"density/{site}/{n:02d}" for site in ("dec_sa", "cross", "dec_ff") for n in range(3)}
    assert names == enc | dec | {"density/embed/00"}
    assert len(names) == config.num_masks(config.dropout_sites)


def test_no_mask_without_a_site() -> None:
    module = build(small(learned_dropout=LearnedDropoutConfig(sites=["cross"]))).get_submodule(
        "backbone.encoder.0.ff_dropout"
    )
    assert type(module) is SiteDropout
    x = torch.randn(3, 12, 16)
    assert module(x, KEYS)[0] is x
