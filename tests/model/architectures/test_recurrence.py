"""Layers that are applied several times, and tokens that halt, against plain models and Graves' equations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.architectures.backbone import Embedded
from model.architectures.blocks import EncoderLayer
from model.architectures.recurrence import Halting, Recurrence, Streams
from model.attention.cache import Cache
from model.attention.visibility import CAUSAL
from model.batch import Batch
from model.layers.layers import TiedEmbedding
from model.layers.noise import of_step, sample_keys
from tests.model.attention.test_causality import leak
from tests.model.helpers import ARCHITECTURES, batch_of, build, small, variant, without_dropout

OFF: dict[str, Any] = {"learned_dropout": without_dropout()}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "encoder_only"])
def test_steps_without_marks_are_layers_with_equal_weights(architecture: str) -> None:
    options = {"steps": 3, "step_embedding": "none"}
    tied = build(small(architecture, layers=2, recurrence=options, **OFF))
    deep = build(small(architecture, layers=6, **OFF))
    weights = tied.state_dict()
    assert tied.num_parameters() == build(small(architecture, layers=2, **OFF)).num_parameters()
    for stream in ("encoder", "decoder", "layers"):
        for name in [name for name in weights if name.startswith(f"backbone.{stream}.")]:
            head, _, layer, rest = name.split(".", 3)
            for step in (1, 2):
                weights[f"{head}.{stream}.{int(layer) + 2 * step}.{rest}"] = weights[name]
    deep.load_state_dict(weights)
    ids = batch_of(tied.config).input_ids
    assert torch.equal(tied(ids), deep(ids))


def reference(states: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Graves' equations 5 to 13, of one token's states [S, C] -> x [C], n, R."""
    total, x = torch.zeros(()), torch.zeros(states.shape[1])
    for n, state in enumerate(states, 1):
        p = torch.sigmoid(state @ weight + bias)
        if n == len(states) or total + p >= 1 - epsilon:
            return x + (1 - total) * state, torch.tensor(float(n)), 1 - total
        x, total = x + p * state, total + p
    raise AssertionError


def replaced(config: Any, **options: Any) -> Any:
    """The same with other options of recurrence."""
    return config.model_copy(update={"recurrence": config.recurrence.model_copy(update=options)})


@pytest.mark.parametrize("epsilon", [0.01, 0.4])
def test_halting_is_that_of_the_equations_and_ponders_gradient_comes_through_the_remainder(epsilon: float) -> None:
    config = small("decoder_only", recurrence={"steps": 5, "halt": True, "halt_bias": 0, "epsilon": epsilon}, **OFF)
    recurrence = Recurrence(config).double()
    assert recurrence.halting is not None
    nn.init.normal_(recurrence.halting.weight, std=0.5)
    states = torch.randn(5, 3, 7, 16, dtype=torch.float64)
    first, met = torch.randn(3, 7, 16, dtype=torch.float64), []

    def apply(streams: Streams, keys: Tensor | None, hold: Any) -> tuple[Streams, dict[str, Any]]:
        met.append(streams[0])
        return (hold(streams[0], states[len(met) - 1]),), {}

    found = recurrence(apply, lambda *_: None, (first,), None)
    unit = recurrence.halting
    torch.set_default_dtype(torch.float64)
    try:
        tokens = [reference(states[:, b, t], unit.weight[0], unit.bias[0], epsilon) for b in range(3) for t in range(7)]
    finally:
        torch.set_default_dtype(torch.float32)
    x, taken, remainder = (torch.stack(values).unflatten(0, (3, 7)) for values in zip(*tokens, strict=True))
    torch.testing.assert_close((found.x, found.taken, found.remainder), (x, taken, remainder), rtol=0, atol=1e-12)
    assert taken.unique().numel() > 2
    eager = Recurrence(replaced(config, epsilon=0.7)).double()
    eager.load_state_dict(recurrence.state_dict())
    met.clear()
    sooner = eager(apply, lambda *_: None, (first,), None).taken
    assert (sooner <= taken).all() and (sooner < taken).any()
    embedded = Embedded(
        first, None, None, CAUSAL, {}, torch.zeros(3, 7, dtype=torch.int64), TiedEmbedding(4, first.shape[-1])
    )
    ponder = found.hidden(embedded, 5).penalised["ponder"]
    ours = torch.autograd.grad(ponder, list(unit.parameters()))
    theirs = torch.autograd.grad(remainder.mean(), list(unit.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    states = constant = torch.ones_like(states)
    met.clear()
    assert torch.allclose(recurrence(apply, lambda *_: None, (constant[0],), None).x, constant[0]), "weights sum to 1"


_SCORES = ("synthesizer", "routing")
"""Whose keys are none, or partly the queries."""


def calls_of(model: nn.Module, run: Any) -> int:
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, EncoderLayer)]
    run()
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize(
    ("name", "changes"),
    [("halting", {}), ("halting_decoder", {})]
    + [("halting_decoder", {"scores": {"kind": kind}, "positions": "learned", "kv_heads": None}) for kind in _SCORES],
)
def test_training_runs_all_steps_and_decoding_stops_when_all_tokens_have_halted(
    name: str, changes: dict[str, Any]
) -> None:
    """Ranks that gather partitioned weights have to call each module as often."""
    config = variant(name, **changes)
    model, recurrence, layers, batch = build(config).double(), config.recurrence, config.layers, batch_of(config)
    unit = next(m for m in model.modules() if isinstance(m, Halting))
    nn.init.constant_(unit.bias, 10.0)
    assert calls_of(model, lambda: model(batch).loss.backward()) == layers * recurrence.steps
    model.eval()
    cache, ids = Cache(torch.zeros(3, dtype=torch.int64), 12), batch.input_ids
    assert calls_of(model, lambda: cache.logits(model, ids[:, :7])) == layers
    nn.init.constant_(unit.bias, -10.0)  # and what comes behind reads what the steps that were left out had given
    found = cache.logits(model, ids[:, 7:])
    cache = Cache(torch.zeros(3, dtype=torch.int64), 12)
    cache.may_stop = False
    nn.init.constant_(unit.bias, 10.0)
    assert calls_of(model, lambda: cache.logits(model, ids[:, :7])) == layers * recurrence.steps
    nn.init.constant_(unit.bias, -10.0)
    torch.testing.assert_close(found, cache.logits(model, ids[:, 7:]), rtol=0, atol=1e-12)


def test_the_leak_test_catches_a_halting_unit_that_sees_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Halting.forward
    monkeypatch.setattr(Halting, "forward", lambda self, x: own(self, x + x.mean(1, keepdim=True)))
    assert leak(variant("halting_decoder"), "eval")[0] > 1e-6


def test_noise_of_a_step_is_its_own() -> None:
    keys = sample_keys(1, torch.tensor(5), torch.arange(3))
    assert torch.stack([of_step(keys, step) for step in range(4)]).unique().numel() == 12
    assert of_step(keys, 0) is keys


def test_a_dearer_step_is_taken_less_often() -> None:
    def steps(weight: float) -> float:
        ponder = {"weight": weight, "start_step": 0, "ramp_steps": 0}
        options = {"steps": 4, "halt": True, "halt_bias": -2, "ponder": ponder}
        model = build(small("decoder_only", layers=1, recurrence=options, **OFF))
        batch, optimizer = batch_of(model.config), torch.optim.AdamW(model.parameters(), lr=3e-2)
        for step in range(1, 21):
            output = model(Batch(batch.input_ids, batch.labels, batch.samples, torch.tensor(step), batch.seed))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        return float(output.metrics["ponder_steps"])

    free, dear = steps(0.0), steps(1.0)
    assert dear < 1.5 < 2.5 < free
