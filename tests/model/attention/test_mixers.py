"""Other weights and other scores of attention hold what a softmax holds: causality, caches, documents, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.attention.visibility import CAUSAL
from model.attention.weights import AdaptiveSpan, Entmax, _Held, _Spanned
from model.layers.noise import sample_keys
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.attention import test_causality
from tests.model.attention.test_cache import cached, full
from tests.model.attention.test_causality import leak
from tests.model.attention.test_documents import ROWS, documents, packed
from tests.model.attention.test_patterns import copied, influence, plain
from tests.model.helpers import MIXED, MIXED_BOTH_WAYS, VOCABULARY, batch_of, build, open_masks, small, variant

EVERY = {**MIXED, **MIXED_BOTH_WAYS}
APART = [name for name, changes in EVERY.items() if changes.get("architecture") != "encoder_decoder"]


def opened(model: TokenModel) -> TokenModel:
    """As after training: scores that differ, parameters of heads that do."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in open_masks(model).named_parameters():
        if name.endswith(("qkv.weight", "query.weight", "key_value.weight")):
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        if name.endswith("alpha_logit"):
            torch.nn.init.normal_(parameter, std=1.0, generator=generator)
        if name.endswith("mixer.share"):
            torch.nn.init.uniform_(parameter, 0.1, 0.6, generator=generator)
    return model.double()


def model_of(name: str, **changes: Any) -> TokenModel:
    return opened(build(variant(name, **changes)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MIXED)
def test_earlier_predictions_ignore_a_token(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_causality, "open_masks", opened)
    before, after = leak(variant(name), mode)
    assert before < 1e-12
    assert after > 1e-3
    monkeypatch.setattr(test_causality.CausalAttention, "forward", test_causality.leaky)
    assert leak(variant(name), mode)[0] > 1e-6, "the check itself"


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 4, 1, 2]], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_cache_changes_nothing_and_a_padded_text_is_the_text_alone(name: str, chunks: list[int]) -> None:
    model = model_of(name).eval()
    ids, padding = batch_of(model.config, sequences=4).input_ids, [0, 3, 7, 10]
    torch.testing.assert_close(cached(model, ids, chunks), full(model, ids, chunks), rtol=0, atol=1e-10)
    together = cached(model, ids, chunks, padding)
    for row, pads in enumerate(padding):
        alone = full(model, ids[row : row + 1, pads:], [1] * (12 - pads))[0]
        for step, end in enumerate(torch.tensor(chunks).cumsum(0).tolist()):
            if end > pads:
                torch.testing.assert_close(together[row, step], alone[end - pads - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", APART)
def test_a_document_in_a_row_is_read_as_if_alone(name: str) -> None:
    model = model_of(name, document_mask=True)
    batch = packed(model.config)
    with torch.no_grad():
        together = model.predict(batch.input_ids, None, batch)
        for row, place in documents():
            alone = model.predict(batch.input_ids[row : row + 1, place], None)
            torch.testing.assert_close(alone[0], together[row, place], rtol=0, atol=1e-10)
    assert len(together) == len(ROWS)


def gradients(model: TokenModel, **changes: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model.train()(batch_of(model.config))
    output.loss.backward()
    return {"loss": output.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


TRACED = ("entmax", "span")


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_learns_alike_when_layers_are_recomputed_or_traced(name: str) -> None:
    """As `engine.activation_checkpointing` and `engine.compile` do."""
    plain, recomputed, traced = (model_of(name, layers=1 if name in TRACED else 2) for _ in range(3))
    expected = gradients(plain)
    assert set(expected) == {"loss", *(n for n, _ in plain.named_parameters())}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected.values())
    checkpoint_activations(recomputed)
    torch.testing.assert_close(gradients(recomputed), expected)
    if name not in TRACED:
        return
    torch._dynamo.reset()
    for layer in [m for m in traced.modules() if type(m).__name__ in ("EncoderLayer", "DecoderLayer")]:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(gradients(traced), expected)


@pytest.mark.parametrize("name", ["entmax", "t5_entmax"])
def test_alphas_and_zeros_are_told_of_each_head(name: str) -> None:
    model = model_of(name)
    metrics = model.train()(batch_of(model.config)).metrics
    found = [module for module in model.modules() if isinstance(module, Entmax)]
    assert len(found) == 6
    for module in found:
        for head, logit in enumerate(module.alpha_logit):
            assert metrics[f"alpha/{module.name}/h{head}"] == 1 + logit.sigmoid()
            assert 0 <= metrics[f"zeros/{module.name}/h{head}"] < 1
    assert metrics["alpha"] == pytest.approx(torch.cat([1 + m.alpha_logit.sigmoid() for m in found]).mean().item())
    assert metrics["zeros"] > 0.02
    assert not model.eval()(batch_of(model.config)).metrics.keys() & {"alpha", "zeros"}


def test_zeros_are_a_share_of_what_is_seen() -> None:
    """Of 12 tokens that see the first alone with a weight, 66 of 78 visible pairs are zeros."""
    model = build(small("decoder_only", layers=1, weights={"kind": "entmax", "alpha": 2.0}))
    mixer = next(module for module in model.modules() if isinstance(module, Entmax))
    query = torch.ones(1, 2, 12, 8)
    key = torch.zeros(1, 2, 12, 8)
    key[:, :, 0] = 9.0
    weights = mixer._formed(query, key, sample_keys(1, torch.tensor(1), torch.arange(1)), CAUSAL)
    assert (weights[..., 0] == 1).all()
    assert mixer.told()["dec_sa/00/h1"]["zeros"] == pytest.approx(66 / 78)
    assert not mixer.told()


def spanned(scores: Tensor, spans: Tensor, ramp: int = 4) -> Tensor:
    places = torch.arange(scores.shape[-1])[None]
    weights: Tensor = _Spanned.apply(scores, spans, ramp, places, places)
    return weights


def test_a_span_weighs_by_the_ramp_and_its_gradient_is_that_of_the_formula() -> None:
    """Equations 3 to 5, written out; a span beyond the text is a softmax."""
    scores = torch.randn(2, 3, 12, 12, dtype=torch.float64).masked_fill(torch.ones(12, 12).triu(1) > 0, -torch.inf)
    spans = torch.tensor([0.3, 3.5, 20.0], dtype=torch.float64)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    chi = ((4 + spans[:, None, None] - distance) / 4).clamp(0, 1)
    expected = chi * scores.exp()
    torch.testing.assert_close(spanned(scores, spans), expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(spanned(scores, spans)[:, 2], scores[:, 2].softmax(-1))
    finite = scores.clamp(min=-30).requires_grad_()
    assert torch.autograd.gradcheck(spanned, (finite, spans.requires_grad_()))
    [slope] = torch.autograd.grad(spanned(scores, spans)[..., :3].square().sum(), spans)
    assert slope[:2].all() and slope[2] == 0.0, "none where no key stands on the ramp"


def test_a_span_stays_between_0_and_all_and_comes_back() -> None:
    share = torch.tensor([-0.2, 0.5, 1.2], requires_grad=True)
    for direction, moved in ((1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, 0.0])):
        held: Tensor = _Held.apply(share)
        assert held.tolist() == pytest.approx([0.0, 0.5, 1.0])
        [gradient] = torch.autograd.grad((direction * held).sum(), share)
        assert gradient.tolist() == moved


def test_a_prediction_depends_on_what_lies_within_the_span_and_the_ramp() -> None:
    """Of heads with z = 0 and z = 2, through two layers: at distances of less than 3 + 2 each."""
    weights = {"kind": "adaptive_span", "ramp": 3}
    model = plain({}, weights=weights, heads=2)
    for module in model.modules():
        if isinstance(module, AdaptiveSpan):
            torch.nn.init.zeros_(module.share)
            module.share.data[1] = 2 / 12
            assert module.reach() == 5
    distance = torch.arange(12) - torch.arange(12)[:, None]
    assert torch.equal(influence(model, 12), (distance >= 0) & (distance < 2 * 5 - 1))


def test_the_penalty_is_on_the_mean_span_in_tokens_and_starts_late() -> None:
    penalty = {"weight": 0.5, "start_step": 5, "ramp_steps": 10}
    config = small(
        "decoder_only", weights={"kind": "adaptive_span", "penalty": penalty}, learned_dropout={"enabled": False}
    )
    for step, weight in ((5, 0.0), (10, 0.25), (90, 0.5)):
        output = build(config).train()(batch_of(config, step=step))
        assert output.metrics["span"] == 12.0
        assert output.metrics["span_weight"] == pytest.approx(weight)
        penalised = output.metrics["loss"] - output.metrics["cross_entropy"]
        assert penalised.item() == pytest.approx(weight * 12, abs=1e-5)


def copy_with_spans(steps: int = 500, lr: float = 5e-3, **weights: Any) -> tuple[float, list[float]]:
    """Loss of a copy from 8 tokens before, over that of chance, and the spans of the two heads; `lr` is theirs."""
    spans = {"kind": "adaptive_span", "ramp": 4, **weights}
    shape: dict[str, Any] = {"layers": 1, "width": 32, "context": 32, "positions": "rotary", "weights": spans}
    model = plain({}, **shape).float().train()
    parameters = [[p for n, p in model.named_parameters() if n.endswith("share") == own] for own in (False, True)]
    groups = [
        {"params": own, "lr": rate, "weight_decay": 0.0} for own, rate in zip(parameters, (5e-3, lr), strict=True)
    ]
    loss = copied(model, torch.optim.AdamW(groups), 8, steps) / math.log(VOCABULARY)
    return loss, parameters[1][0].clamp(0, 1).mul(32).tolist()


@pytest.mark.drill
def test_spans_close_as_far_as_a_copy_lets_them_if_they_start_wide_and_the_penalty_late() -> None:
    """The text repeats itself every 8 tokens, so that 16 and 24 before stands the same."""
    late = {"weight": 1e-2, "start_step": 350, "ramp_steps": 50}
    loss, spans = copy_with_spans(800, penalty=late)
    assert loss < 0.6
    assert min(spans) < 1
    assert 8 <= max(spans) + 4 < 25
    loss, spans = copy_with_spans(span_init=0.0, penalty=late)
    assert loss > 0.95, "as published: what lies beyond the ramp is never seen"
    assert max(spans) + 4 < 8
    loss, spans = copy_with_spans(lr=5e-2, penalty={"weight": 0.1, "start_step": 0, "ramp_steps": 0})
    assert loss > 0.95, "closed before the head has learned what it is for"
