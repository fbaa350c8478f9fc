"""Whole models: they learn, every parameter takes part, and what they learnt can be read back."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.architectures.token_model import TokenModel
from model.batch import IGNORE, Batch
from model.config.mask_config import LearnedDropoutConfig
from model.generation.generate import generate
from model.generation.sampling import Sampling
from tests.model.helpers import (
    ARCHITECTURES,
    EVERY,
    VOCABULARY,
    batch_of,
    build,
    open_masks,
    small,
    variant,
    without_dropout,
)


def overfit(model: TokenModel, batch: Batch, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(1, steps + 1):
        output = model(Batch(batch.input_ids, batch.labels, batch.samples, torch.tensor(step), batch.seed))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["cross_entropy"].item())
    return losses


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_overfit_model_recites(architecture: str, enabled: bool) -> None:
    config = small(architecture, width=32, heads=4, learned_dropout=LearnedDropoutConfig(enabled=enabled))
    model = build(config)
    sequence = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))[: config.context + 1]
    batch = Batch(sequence[None, :-1], sequence[None, 1:], torch.tensor([0]), torch.tensor(1), seed=0)
    losses = overfit(model, batch, steps=80)
    assert losses[0] > 2.5
    assert losses[-1] < 0.3
    model.eval()
    recited = list(generate(model, sequence[:1], Sampling(temperature=0.0), max_new_tokens=config.context))
    assert recited == sequence[1:].tolist()


@pytest.mark.parametrize(
    "name", ["layer_input", "encoder_loss_serial", "dropout", "everywhere_embed", "l0", "modern", "post_norm"]
)
def test_other_variants_learn(name: str) -> None:
    config = variant(name)
    losses = overfit(build(config), batch_of(config, sequences=1), steps=30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_a_gradient(name: str, bias: bool) -> None:
    config = variant(name, bias=bias)
    model = build(config)
    model(batch_of(config)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", EVERY)
def test_bf16_forward_and_backward_are_finite(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).bfloat16()
    output = model(batch_of(config, step=5000))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(value.isfinite().all() for value in output.metrics.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_nothing_costs_nothing() -> None:
    config = small(learned_dropout=without_dropout())
    batch = batch_of(config)
    output = build(config)(
        Batch(batch.input_ids, torch.full_like(batch.labels, IGNORE), *list(vars(batch).values())[2:])
    )
    output.loss.backward()
    assert output.loss == 0


def test_the_seed_alone_decides_the_first_weights_and_the_start_is_nearly_uniform() -> None:
    config = small(width=64, heads=4)
    first, second = build(config, seed=1), build(config, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.token_embed.weight, build(config, seed=2).token_embed.weight)
    assert first(batch_of(config)).metrics["cross_entropy"].item() == pytest.approx(
        torch.tensor(VOCABULARY).log().item(), abs=0.15
    )


def test_start_of_each_weight() -> None:
    config = small(width=128, heads=4, layers=8, learned_dropout={"sites": ["enc_ff", "dec_ff", "cross"]})
    weights = dict(build(config).named_parameters())
    for name, std in {
        "token_embed.weight": 0.02,
        "position_embed.weight": 0.02,
        "backbone.decoder_input.weight": 128**-0.5,
        "backbone.encoder.3.attention.qkv.weight": 0.02,
        "backbone.encoder.3.attention.out.weight": 0.02 / 4,
        "backbone.decoder.3.cross_attention.out.weight": 0.02 / 4,
        "backbone.decoder.3.ff.down.weight": 0.02 / 4,
        "backbone.decoder.3.ff_dropout.qkv.weight": 0.02,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.06), name
    assert (weights["backbone.decoder.3.ff_dropout.shift"] == 0.5).all()


def test_options_of_the_start() -> None:
    config = small(width=128, heads=4, layers=8, decoder_residual_writes=3, decoder_input_std=0.02, ff="swiglu")
    weights = dict(build(config).named_parameters())
    for name, std in {
        "backbone.decoder_input.weight": 0.02,
        "backbone.encoder.3.attention.out.weight": 0.02 / 16**0.5,
        "backbone.decoder.3.cross_attention.out.weight": 0.02 / 24**0.5,
        "backbone.decoder.3.attention.out.weight": 0.02 / 24**0.5,
        "backbone.decoder.3.ff.down.weight": 0.02 / 24**0.5,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize("name", EVERY)
def test_recomputed_layers_meet_the_same_noise(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config))
    batch = batch_of(config)
    model(batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    layers = [m for name, m in model.named_modules() if type(m).__name__ in ("EncoderLayer", "DecoderLayer")]
    for layer in layers:
        layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)
    model(batch).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(layers) >= 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_is_deterministic_and_has_no_penalty(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).eval()
    first, later = model(batch_of(config, step=5)), model(batch_of(config, step=5000, first_sample=7))
    assert torch.equal(first.loss, later.loss)
    assert first.loss == first.metrics["cross_entropy"] == first.metrics["loss"]
    assert "encoder_loss" not in first.metrics


def test_too_long_a_sequence_is_refused() -> None:
    config = small()
    with pytest.raises(ValueError, match="13 tokens do not fit a context of 12"):
        build(config).logits(torch.zeros(1, 13, dtype=torch.int64))
