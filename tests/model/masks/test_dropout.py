"""Ordinary dropout: its rate, its noise, and that evaluation knows nothing of it."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from data_pipeline.errors import ConfigError
from model.attention import softmax
from model.attention.attention import CausalAttention
from model.layers.dropout import dropout, noise_site, weight_dropout
from model.layers.noise import sample_keys
from tests.model.helpers import batch_of, build, small, variant, without_dropout

KEYS = sample_keys(0, torch.tensor(1), torch.arange(40))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_mean(rate: float) -> None:
    tolerance = 5 * (rate * (1 - rate) / 40_000) ** 0.5
    found = dropout(torch.ones(40, 50, 20), KEYS, noise_site("here"), rate)
    assert (found == 0).float().mean().item() == pytest.approx(rate, abs=tolerance)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    weights = weight_dropout(torch.ones(40, 5, 14, 14), KEYS, noise_site("here"), rate, 20)
    assert (weights == 0).float().mean().item() == pytest.approx(rate, abs=tolerance)
    per_head = (weights == 0).float().mean(dim=(0, 2, 3))
    assert per_head.numpy() == pytest.approx(rate, abs=3 * tolerance)
    assert not torch.equal(weights[:, 0], weights[:, 1])


def test_places_draw_alone() -> None:
    ones = torch.ones(40, 50, 20)
    here, there = (dropout(ones, KEYS, noise_site(name), 0.5) for name in ("dropout/enc_ff/00", "dropout/enc_ff/01"))
    assert (here == there).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_no_rate_and_no_keys_leave_all_as_it_is() -> None:
    x = torch.randn(3, 4, 5)
    assert dropout(x, None, 1, 0.5) is x
    assert dropout(x, KEYS[:3], 1, 0.0) is x


@pytest.mark.parametrize("name", ["dropout", "dropout_decoder", "dropout_modern"])
def test_evaluation_equals_a_model_without_dropout(name: str) -> None:
    """Attention weights included, which are dropped in evaluation, too, where a rate is handed to the fused kernel."""
    config = variant(name)
    plain = config.model_copy(update={"dropout": 0.0, "attention_dropout": None})
    model, other = build(config).eval(), build(plain).eval()
    batch = batch_of(config)
    assert torch.equal(model(batch).loss, other(batch).loss)
    assert not torch.equal(model.train()(batch).loss, other.train()(batch).loss)


def test_every_place_of_ordinary_dropout_takes_part() -> None:
    """A layer's output, one rate at a time: the update of each sublayer, and the attention weights."""
    config = small(dropout=0.5, learned_dropout=without_dropout())
    model = build(config)
    batch = batch_of(config)
    places: list[Any] = [m for m in model.modules() if getattr(m, "_rate", 0.0)]
    # Embedded tokens; 2 layers of 2 and 3 updates, of 1 and 2 attentions.
    assert len(places) == 1 + 2 * (2 + 3) + 2 * (1 + 2)
    for place in places:
        place._rate = 0.0
    still = model(batch).loss
    for place in places:
        place._rate = 0.5
        assert not torch.equal(model(batch).loss, still)
        place._rate = 0.0


@pytest.mark.parametrize("name", ["modern", "parallel", "sinusoidal"])
def test_explicit_attention_is_the_fused_one(name: str) -> None:
    fused = build(variant(name, attention="flash")).double().eval()
    explicit = build(variant(name, attention="explicit")).double().eval()
    ids = batch_of(variant(name)).input_ids
    torch.testing.assert_close(fused.logits(ids), explicit.logits(ids), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flash_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "no fused kernel for heads of 8 channels in torch.float32 on cpu; take auto"
    strided = torch.randn(1, 2, 8, 8).mT  # the fused ones want channels side by side
    with pytest.raises(ConfigError, match=message):
        softmax._fused(strided, strided, strided, None, True)
    monkeypatch.setattr(softmax, "_FUSED", [SDPBackend.CUDNN_ATTENTION])  # which a CPU has not
    model = build(small(attention="flash"))
    with pytest.raises(ConfigError, match=message):
        model.logits(torch.zeros(1, 4, dtype=torch.int64))


def test_grouped_queries_share_keys_and_values() -> None:
    config = small(width=24, heads=6, kv_heads=2)
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = CausalAttention(config, 6, group=3)(query, key, value, None)
    for head in range(6):
        q = query[..., 4 * head : 4 * head + 4]
        k, v = (x[..., 4 * (head // 3) : 4 * (head // 3) + 4] for x in (key, value))
        expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(found[..., 4 * head : 4 * head + 4], expected)
