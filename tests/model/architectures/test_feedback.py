"""The Feedback Transformer against a slow reference, what it reads, and what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import ConfigError
from model.architectures.feedback.model import FeedbackStack, Memories
from model.attention.cache import Cache
from model.costs.totals import activations, forward_flops, num_parameters, sample_flops_by_part
from pretrain.config.schema import load
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.attention.test_cache import cached, full
from tests.model.attention.test_causality import leak
from tests.model.costs.test_activations import ROWS, measure
from tests.model.helpers import FEEDBACK, batch_of, build, variant


def model_of(name: str) -> Any:
    return build(variant(name)).double()


def reference(model: Any, ids: Tensor) -> Tensor:
    """Equations 5 to 8, of one text [T] and the plain variant: every memory anew for each token."""
    [stack] = model.backbone.stack
    width, heads = model.config.width, model.config.heads
    embedded = model.token_embed(ids) + model.position_embed.weight[: len(ids)]
    shares, found, memories = stack.writer.shares.softmax(0), [], [stack.writer.nothing]
    for x in embedded:
        states = [x]
        pairs = [stack.writer.key_value(stack.writer.norm(m)) for m in memories]
        key, value = torch.stack(pairs).chunk(2, dim=-1)
        for layer in stack.layers:
            query = layer.query(layer.attention_norm(x))
            mixed = []
            for q, k, v in zip(query.chunk(heads), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
                mixed.append((k @ q / (width / heads) ** 0.5).softmax(0) @ v)
            x = x + layer.out(torch.cat(mixed))
            x = x + layer.ff.down(functional.gelu(layer.ff.up(layer.ff_norm(x))))
            states.append(x)
        memories.append(sum(share * state for share, state in zip(shares, states, strict=True)))
        found.append(x)
    return model.final_norm(torch.stack(found)) @ model.token_embed.weight.T


def test_it_is_what_the_equations_say() -> None:
    model = model_of("feedback").eval()
    nn.init.normal_(model.backbone.stack[0].writer.shares)
    ids = batch_of(model.config).input_ids
    torch.testing.assert_close(model(ids)[1], reference(model, ids[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FEEDBACK)
def test_no_prediction_knows_a_later_token(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = leak(variant(name), mode)
    assert before < 1e-12 < 1e-3 < after
    own = FeedbackStack.forward
    monkeypatch.setattr(FeedbackStack, "forward", lambda self, x, *rest: own(self, x + x.mean(1, keepdim=True), *rest))
    assert leak(variant(name), mode)[0] > 1e-6


@pytest.mark.parametrize("name", FEEDBACK)
def test_a_cache_changes_nothing_nor_do_pads(name: str) -> None:
    model = model_of(name).eval()
    ids = batch_of(model.config).input_ids
    for chunks in ([1] * 12, [5, 4, 1, 2]):
        torch.testing.assert_close(cached(model, ids, chunks), full(model, ids, chunks), rtol=0, atol=1e-12)
    together = cached(model, ids, [5, 4, 1, 2], [0, 3, 7])
    for row, pads in enumerate([0, 3, 7]):
        alone = full(model, ids[row : row + 1, pads:], [12 - pads])
        torch.testing.assert_close(together[row, -1], alone[0, 0], rtol=0, atol=1e-12)
    cache = Cache(torch.zeros(3, dtype=torch.int64), 12)
    cache.logits(model, ids)
    [(keys, values)] = cache._stored.values()
    assert keys.shape == values.shape == (3, model.config.kv_heads or model.config.heads, 12, keys.shape[3])


def test_lower_layers_read_upper_layers_of_earlier_tokens_within_the_window() -> None:
    model = model_of("feedback_window")
    seen: list[Tensor] = []
    stack = model.backbone.stack[0]
    stack.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    upper: list[Tensor] = []
    stack.layers[-1].register_forward_hook(lambda _, inputs, output: upper.append(output))
    model.predict(batch_of(model.config, sequences=1).input_ids, None)
    assert [x.shape for x in seen] == [(1, 1, 16)] * 12, "a step for each token, in training"
    for token in (3, 9):
        reached = torch.autograd.grad(seen[token].square().sum(), upper[:token], retain_graph=True, allow_unused=True)
        assert reached[-1] is not None and reached[-1].any()
    numbers = torch.arange(9.0)[None, None, :, None]
    read = stack._last(Memories(numbers, numbers))
    assert read.key.flatten().tolist() == [0.0, 5.0, 6.0, 7.0, 8.0], "the null memory and the last four"


@pytest.mark.parametrize("name", FEEDBACK)
def test_costs_are_what_torch_counts(name: str) -> None:
    config = variant(name)
    model, batch = build(config), batch_of(config, 2)
    assert model.num_parameters() == num_parameters(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    unread = 4 * config.width**2 // config.queries_per_kv_head  # the last token's memory has no gradient
    assert counter.get_total_flops() == 2 * (3 * forward_flops(config) - 2 * unread)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert "memory" in sample_flops_by_part(config)
    for size in (4, 2):
        larger = variant(name, width=48, context=40)
        counted = activations(larger, ROWS, size)
        assert counted.kept(False) + counted.loss == pytest.approx(measure(larger, size), rel=0.15)
        assert counted.kept(True) < counted.kept(False) / 3


def test_checkpointing_computes_segments_again_and_finds_the_same() -> None:
    model, again = model_of("feedback_dropout").train(), model_of("feedback_dropout").train()
    batch = batch_of(model.config)
    checkpoint_activations(again)
    calls = []
    again.backbone.stack[0].writer.register_forward_hook(lambda *_: calls.append(1))
    for of in (model, again):
        of(batch).loss.backward()
    assert len(calls) > 1 + 12
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


REFUSED: dict[str, str] = {
    "engine.zero_stage=3": "takes 256 steps for a text, and ZeRO 3 would gather every weight in each; take stage 2",
    "engine.compile=true": "takes 256 steps for a text, each of other shapes",
    "model.context=2048": "each step of training would take 2048 steps through all layers",
    "model.document_mask=true": "feedback writes one memory after the other",
    "data.objective=prefix": "writes a memory of each token before it reads the next",
    "model.learned_dropout.sites=[dec_ff]": "learned_dropout: feedback computes one token at a time",
    "model.pattern.kind=strided": "model.memory says how many",
    "model.weights.kind=entmax": "reads memories by a softmax",
    "model.scores.kind=routing": "reads memories by q k",
    "model.recurrence.steps=2": "the layers of feedback are applied once",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_crawl_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[key]):
        load(["model.architecture=feedback", key])
