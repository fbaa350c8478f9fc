"""A feed forward in gated blocks: its forms give the same, closed blocks are not read, and density is held."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.attention.visibility import CAUSAL
from model.generation.generate import Generation
from model.generation.inspection import inspect
from model.generation.sampling import Sampling
from model.layers.block_forms import Blocks, all_blocks, blocks_of_one, open_blocks
from model.layers.layers import FeedForward
from model.layers.noise import sample_keys
from model.masks import block_gates as module
from model.masks.block_gates import BlockFeedForward, block_gates
from model.masks.sites import feed_forward_at
from tests.model.helpers import batch_of, build, open_masks, small, variant

GATED = ("gates", "gates_cosine", "gates_modern", "t5_gates", "bert_gates")
OFF = {"learned_dropout": {"enabled": False}}
STEP, SAMPLES = torch.tensor(3), torch.arange(4)


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open blocks alone are computed in models as small as these, too."""
    monkeypatch.setattr(module, "pays", lambda *sizes, **options: True)


def feed_forward(kind: str = "top", ff: str = "gelu", **gates: Any) -> BlockFeedForward:
    torch.manual_seed(0)
    config = small("decoder_only", width=24, heads=2, ff=ff, bias=True, block_gates={"kind": kind} | gates, **OFF)
    found = feed_forward_at(config, "dec_ff", 1, 0.02)
    assert isinstance(found, BlockFeedForward)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(found.gate, std=0.3)
    return found


def blocks_with(opened: Tensor, activation: Any) -> tuple[Tensor, Tensor, Blocks]:
    rows, blocks = opened.shape

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    outputs = 10 if activation == "swiglu" else 5
    weights = (torch.rand(rows, blocks, dtype=torch.float64) * opened).requires_grad_()
    return (
        drawn(rows, 6),
        weights,
        Blocks(drawn(blocks, outputs, 6), drawn(blocks, outputs), drawn(blocks, 5, 6), activation),
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_the_forms_give_the_same_with_any_number_of_open_blocks(share: float, activation: str) -> None:
    """Outputs, and gradients of all but the weights of closed blocks."""
    opened = torch.rand(7, 3) < share
    x, weights, blocks = blocks_with(opened, activation)
    assert blocks.up_bias is not None
    inputs = (x, weights, blocks.up, blocks.up_bias, blocks.down)
    expected, found = all_blocks(x, weights, blocks), open_blocks(x, weights, opened, blocks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    given = torch.autograd.grad((found * direction).sum(), inputs)
    for name, one, other in zip(("x", "weights", "up", "bias", "down"), given, wanted, strict=True):
        torch.testing.assert_close(one, other * opened if name == "weights" else other, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(open_blocks(x, weights, opened, blocks), expected, rtol=0, atol=1e-12)
        one_by_one = [blocks_of_one(x[n : n + 1], weights[n : n + 1], opened[n : n + 1], blocks) for n in range(7)]
        torch.testing.assert_close(torch.cat(one_by_one), expected, rtol=0, atol=1e-12)


def test_in_16_bits_on_a_cpu_blocks_see_few_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that oneDNN has not met costs more than the product. What is added weighs nothing."""
    opened = torch.rand(640, 4) < torch.tensor([0.0, 0.2, 0.5, 1.0])
    x, weights, blocks = blocks_with(opened, "gelu")
    assert blocks.up_bias is not None
    inputs = (x, weights, blocks.up, blocks.up_bias, blocks.down)
    wanted = torch.autograd.grad(all_blocks(x, weights, blocks).square().sum(), inputs)
    low = Blocks(blocks.up.bfloat16(), blocks.up_bias.bfloat16(), blocks.down.bfloat16(), "gelu")
    sizes, linear = [], torch.nn.functional.linear

    def noting(x: Tensor, *maps: Any) -> Tensor:
        sizes.append(len(x))
        return linear(x, *maps)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    found = open_blocks(x.bfloat16(), weights.bfloat16(), opened, low)
    assert found.shape == x.shape
    assert sizes == [-(-number // 10) * 10 for number in opened.sum(0).tolist()]
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
        told = other * opened if one.shape == opened.shape else other
        assert (one - told).norm() < 0.02 * told.norm()
    with torch.no_grad():
        closed = torch.zeros_like(opened)
        assert torch.equal(open_blocks(x.bfloat16(), weights.bfloat16(), closed, low), torch.zeros(640, 6).bfloat16())


@pytest.mark.parametrize("ff", ["gelu", "swiglu"])
def test_with_all_gates_open_it_is_the_plain_feed_forward(ff: str) -> None:
    gated = feed_forward("top", ff, density=1.0, blocks=4).double()
    torch.nn.init.zeros_(gated.gate)
    torch.nn.init.zeros_(gated.gate_bias)  # so that each weighs 2 · 0.5
    plain = FeedForward(small("decoder_only", width=24, heads=2, ff=ff, bias=True), 0.02).double()

    def in_halves(x: Tensor) -> Tensor:
        """Gates of all blocks, then values of all."""
        return x.unflatten(0, (4, 2, -1)).transpose(0, 1).flatten(0, 2) if ff == "swiglu" else x

    assert gated.up_bias is not None
    assert gated.down_bias is not None
    up, down = in_halves(gated.up.detach()), gated.down.detach().t()
    plain.up.load_state_dict({"weight": up, "bias": in_halves(gated.up_bias.detach())})
    plain.down.load_state_dict({"weight": down, "bias": gated.down_bias.detach()})
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(gated(x, None)[0], plain(x), rtol=0, atol=1e-12)


def both_forms(model: BlockFeedForward, x: Tensor, keys: Tensor | None) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Output and gradients, once as it is and once as if it were compiled, which takes the plain form."""
    for compiling in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            output = model(x, keys)[0]
        output.square().sum().backward()
        yield output.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()


@pytest.mark.parametrize("ff", ["gelu", "swiglu"])
def test_top_is_grouped_in_training_and_differs_from_the_ungrouped_form_by_rounding(ff: str, pays: None) -> None:
    model = feed_forward("top", ff, blocks=4, density=0.5)
    keys = sample_keys(0, STEP, SAMPLES)
    (found, gradients), (expected, wanted) = both_forms(model, torch.randn(4, 8, 24), keys)
    assert len(gradients) == 6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


def test_cosine_learns_of_closed_blocks_until_training_leaves_them_out_and_gives_the_same(pays: None) -> None:
    model = feed_forward("cosine", blocks=4)
    x, keys = torch.randn(1, 1, 24), sample_keys(0, STEP, SAMPLES[:1])
    opened = model.gates(x, keys).opened[0, 0]
    assert 0 < opened.sum() < 4
    found = []
    for model.sparse in (False, True):
        output = model(x, keys)[0]
        output.square().sum().backward()
        assert model.gate_bias.grad is not None
        found.append((output.detach(), model.gate_bias.grad.clone()))
        model.zero_grad()
    (before, told), (after, told_less) = found
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (told != 0).all()
    assert ((told_less != 0) == opened).all()


def test_a_run_leaves_closed_blocks_out_after_the_step_that_it_names() -> None:
    gates = {"kind": "cosine", "train_sparse_after": 5}
    model = build(small("decoder_only", block_gates=gates, **OFF)).train()
    for step, sparse in ((5, False), (6, True)):
        model(batch_of(model.config, step=step))
        assert {ff.sparse for ff in block_gates(model)} == {sparse}


def test_noise_opens_a_block_as_often_as_m_says_whatever_stands_beside_the_sample() -> None:
    model = feed_forward("cosine", blocks=4)
    x = torch.randn(1, 500, 24).expand(4, -1, -1)
    keys = sample_keys(0, STEP, SAMPLES)
    gates = model.gates(x, keys)
    assert gates.opened.float().mean().item() == pytest.approx(gates.mask.mean().item(), abs=0.02)
    assert (model.gates(x[2:3], keys[2:3]).opened == gates.opened[2:3]).all()
    assert (gates.opened[0] != gates.opened[1]).any()
    assert (model.gates(x, sample_keys(0, STEP + 1, SAMPLES)).opened != gates.opened).any()
    evaluated = model.gates(x)
    assert (evaluated.opened == (evaluated.mask >= 0.5)).all()
    assert (evaluated.weights == evaluated.opened).all()


def test_closed_blocks_are_not_read_when_a_token_is_decoded(pays: None) -> None:
    """What they hold would spread."""
    model = feed_forward("top", blocks=8, density=0.25)
    x = torch.randn(1, 1, 24)
    with torch.no_grad():
        expected = model(x, None)[0]
        closed = ~model.gates(x).opened[0, 0]
        for parameter in (model.up, model.down):
            parameter.view(8, -1, 24)[closed] = torch.nan
        assert torch.equal(model(x, None)[0], expected)
        assert model(torch.cat([x, x]), None)[0].isfinite().all()
        model.down.fill_(torch.nan)
        assert model(x, None)[0].isnan().all()


def test_the_multiplier_brings_the_mean_to_the_density_from_either_side() -> None:
    model = feed_forward("cosine", blocks=4, density=0.25, dual_rate=0.1)
    torch.nn.init.normal_(model.gate, std=0.05)
    optimizer = torch.optim.SGD([model.gate_bias], lr=8.0)
    x, means = torch.randn(2, 50, 24), []
    for _ in range(120):
        [statistics] = model(x, sample_keys(0, STEP, SAMPLES[:2]))[1].values()
        pull = (1.0 - model.gates(x).mask.mean()).square() * 0.4  # of a loss that would have all gates open
        optimizer.zero_grad()
        (statistics["block_penalty"] + pull).backward()
        optimizer.step()
        model.ascend(statistics["mask_mean"])
        means.append(statistics["mask_mean"].item())
    assert means[-1] == pytest.approx(0.25, abs=0.03)
    assert model.multiplier.item() == pytest.approx(0.6, abs=0.05)
    for _ in range(30):
        model.ascend(torch.tensor(0.0))
    assert model.multiplier.item() == 0.0


@pytest.mark.parametrize("name", GATED)
def test_what_is_told_and_penalised(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).train()
    metrics = model(batch_of(config)).metrics
    gates = block_gates(model)
    expected = {"density", "mask_mean"}
    if config.block_gates.kind == "cosine":
        expected |= {"block_penalty", "block_entropy", "multiplier"}
        assert metrics["block_entropy_weight"] == 0
        for ff in gates:
            ff.multiplier.fill_(2.0)
        raised = model(batch_of(config)).metrics
        excess = [2.0 * (raised[f"mask_mean/{ff.name}"] - 0.25) for ff in gates]
        torch.testing.assert_close(raised["loss"] - metrics["loss"], torch.stack(excess).sum(), rtol=0, atol=1e-5)
    for ff in gates:
        assert expected <= {key.removesuffix(f"/{ff.name}") for key in metrics}
        assert len(metrics[f"kept/{ff.name}"]) == ff.blocks + 1


@pytest.mark.parametrize("name", ["gates", "gates_modern"])
def test_a_text_grows_as_if_it_were_read_anew_and_its_gates_are_told(name: str, pays: None) -> None:
    model = open_masks(build(variant(name, context=24))).eval()
    prompts = [torch.arange(5), torch.arange(3, 5)]
    generation = Generation(model, prompts, Sampling(temperature=0.0))
    texts = [prompt.tolist() for prompt in prompts]
    for _ in range(8):
        for number, [token] in generation.step().items():
            assert token == int(model.logits(torch.tensor([texts[number]]))[0, -1].argmax())
            texts[number].append(token)
    seen = inspect(model, torch.tensor(texts[0]))
    assert set(seen.density) == {ff.name for ff in block_gates(model)}
    if name == "gates":
        assert all((density == 0.5).all() for density in seen.density.values())


def test_statistics_leave_padding_out() -> None:
    model = feed_forward("cosine", blocks=4)
    x = torch.randn(2, 6, 24)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 2:] = True
    [told] = model(x, None, CAUSAL._replace(padding=padding))[1].values()
    alone = torch.cat([model.gates(x[:1]).mask.flatten(0, 1), model.gates(x[1:, :2]).mask.flatten(0, 1)])
    assert told["mask_mean"].item() == pytest.approx(alone.mean().item(), abs=1e-6)
    assert told["kept"][-1] == 8


def test_configurations_that_mean_nothing_are_refused_with_the_way_on() -> None:
    for changes, message in (
        (
            {"kind": "top", "blocks": 7, "density": 1.0},
            "does not divide the 64 hidden units of a feed forward; take ff_width=70",
        ),
        ({"kind": "top", "blocks": 4, "density": 0.3}, r"no whole number of blocks, .* nearest: 0.25 or 0.5"),
        ({"kind": "top", "dual_rate": 0.1}, "dual_rate is about kind=cosine; leave it out"),
        ({"kind": "top", "sites": ["enc_ff"]}, "decoder_only has no site enc_ff"),
        ({"kind": "top", "sites": ["dec_sa"]}, "Input should be 'enc_ff' or 'dec_ff'"),
        ({"kind": "top", "left": {"dec_ff/02": 4}}, "expected 2 to 8 blocks of one of dec_ff/00, dec_ff/01"),
        ({"kind": "top", "left": {"dec_ff/01": 1}}, "expected 2 to 8 blocks"),
    ):
        with pytest.raises(ValidationError, match=message):
            small("decoder_only", block_gates=changes, **OFF)
    for masks in ({}, {"l0": {"enabled": True}, **OFF}):
        with pytest.raises(ValidationError, match=r"both stand at dec_ff, two masks on one update; .*enabled=false"):
            small("decoder_only", block_gates={"kind": "top"}, **masks)
