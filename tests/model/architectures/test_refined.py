"""The refined encoder-decoder: what each token knows, what its steps do, and how it writes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.refined.model import Refined
from model.architectures.refined.reading import Reading
from model.architectures.refined.step import Descent, Refiner, Reweighting, surprise, surprise_gradient
from model.architectures.token_model import TokenModel
from model.batch import IGNORE, Batch
from model.costs.flops import training_flops_per_token
from model.costs.totals import activations, forward_flops, num_parameters
from model.generation.generate import Generation
from model.generation.sampling import Sampling
from model.layers.noise import sample_keys
from pretrain.engine.layer_transforms import checkpoint_activations, layers
from pretrain.inference.in_use import used_with
from tests.model.architectures import pointer_chasing
from tests.model.costs.test_activations import measure
from tests.model.costs.test_flops import counted
from tests.model.helpers import VOCABULARY, batch_of, build, open_masks, small

_EVERYWHERE = ["enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"]
_OFF = {"enabled": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "chunked": {"refine": {"chunk": 4, "reweight": True, "gradient": True}, "learned_dropout": _OFF},
    "chunked_everywhere": {
        "refine": {"chunk": 5, "steps": 2, "reweight": True, "temperature": 0.5},
        "learned_dropout": {"sites": _EVERYWHERE, "source": "embed", "eval_rounding": "sample"},
        "norm": "rmsnorm",
        "norm_position": "post",
        "positions": "rotary",
        "heads": 4,
        "kv_heads": 2,
    },
    "chunked_gates": {
        "refine": {"chunk": 3, "steps": 3, "gradient": True},
        "learned_dropout": {"sites": ["embed", "cross"]},
        "block_gates": {"kind": "cosine", "blocks": 4},
        "dropout": 0.1,
        "bias": True,
        "scores": {"kind": "routing", "clusters": 2, "decay": 0.9},
    },
    "prefix": {"refine": {"form": "prefix", "reweight": True, "gradient": True}, "attention": "explicit"},
    "prefix_plain": {"refine": {"form": "prefix", "steps": 1}, "l0": {"enabled": True}, "learned_dropout": _OFF}
    | {"scores": {"kind": "synthesizer", "parts": ["dot", "dense"]}},
    "no_steps": {"refine": {"chunk": 4, "steps": 0}, "positions": "sinusoidal", "weights": {"kind": "entmax"}},
}
"""Options meet in pairs."""
CHUNKED = [name for name in VARIANTS if VARIANTS[name]["refine"].get("form") != "prefix"]


def model_of(name: str, **changes: Any) -> TokenModel:
    return open_masks(build(small("refined", **VARIANTS[name] | changes))).double()


def batched(model: TokenModel, rows: int = 3, prefix: int | None = None) -> Batch:
    batch = batch_of(model.config, rows)
    if not model.config.reads_prompt:
        return batch
    lengths = torch.tensor([3, 5, 8])[:rows] if prefix is None else torch.full((rows,), prefix)
    hidden = torch.arange(model.config.context) < lengths[:, None] - 1
    return replace(batch, prefix_lengths=lengths, labels=batch.labels.masked_fill(hidden, IGNORE))


def changes(model: TokenModel, mode: str, prefix: int | None = None, earlier: bool = False) -> Tensor:
    """Largest change of a logit [T, T]: of a changed token, at each place; read from an `earlier` step or the last."""
    batch = batched(model, 1, prefix)
    length = model.config.context
    ids = batch.input_ids.repeat(length + 1, 1)  # row t changes token t; the last one none
    for place in range(length):
        ids[place, place] = (ids[place, place] + 1) % VOCABULARY
    keys = sample_keys(batch.seed, batch.step, batch.samples).repeat(length + 1) if mode == "train" else None
    lengths = None if prefix is None else batch.prefix_lengths.repeat(length + 1)  # type: ignore[union-attr]
    with torch.no_grad():
        found = model.hidden(ids, keys, replace(batch, input_ids=ids, prefix_lengths=lengths))
        x = found.earlier.x if earlier and found.earlier else found.x
        logits = model.token_embed(x)
    return (logits[:-1] - logits[-1]).abs().amax(dim=-1)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CHUNKED)
def test_no_prediction_knows_a_later_token_and_thoughts_go_back(name: str, mode: str) -> None:
    """Every token is a label; and one early in a finished chunk is heard of through those behind it in the chunk."""
    model = model_of(name)
    for earlier in (False, True) if mode == "train" else (False,):
        change = changes(model, mode, earlier=earlier)
        assert change.tril(-1).max() < 1e-12
        assert change.triu().add(torch.ones_like(change).tril(-1)).min() > 1e-9


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", sorted({*VARIANTS} - {*CHUNKED}))
def test_behind_a_prefix_no_prediction_knows_a_later_token(name: str, mode: str) -> None:
    change = changes(model_of(name), mode, prefix=5)
    assert change[5:].tril(4).max() < 1e-12
    assert change[:5].min() > 1e-9  # all of the prefix, at every place
    assert change[5:, 5:].diagonal().min() > 1e-3


def further(seen: Tensor) -> Tensor:
    """One key more than what may be seen."""
    return seen | seen.roll(1, dims=-1)


VIOLATIONS: dict[str, tuple[str, Any, str, Any]] = {
    "the encoder sees all": ("chunked", Reading, "within", torch.ones_like),
    "the decoder reads a chunk that is not finished": ("chunked", Reading, "across", further),
    "the decoder reads behind the prefix": ("prefix", Reading, "across", further),
    "likeness is weighed over all vectors": ("chunked", Reweighting, "forward", None),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_the_check_catches(violation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With re-weighting and gradient step on."""
    name, owner, method, change = VIOLATIONS[violation]
    rule = getattr(owner, method)

    def broken(self: Any, *given: Any) -> Tensor:
        if change is None:
            given = (given[0], torch.ones_like(given[1]))
        found: Tensor = rule(self, *given)
        return found if change is None else change(found)

    monkeypatch.setattr(owner, method, broken)
    model = model_of(name)
    if name == "prefix":
        assert changes(model, "eval", prefix=5)[5:].tril(4).max() > 1e-6
    else:
        assert changes(model, "eval").tril(-1).max() > 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_text_meets_depends_on_no_other_text(name: str) -> None:
    """In training: alone, or in a row of documents behind another."""
    model = model_of(name)
    batch = batched(model)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    together = model.hidden(batch.input_ids, keys, batch)
    one = slice(1, 2)
    lengths = None if batch.prefix_lengths is None else batch.prefix_lengths[one]
    alone = model.hidden(batch.input_ids[one], keys[one], replace(batch, prefix_lengths=lengths))
    torch.testing.assert_close(alone.x, together.x[one], rtol=0, atol=1e-12)
    if alone.earlier and together.earlier:
        torch.testing.assert_close(alone.earlier.x, together.earlier.x[one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHUNKED)
def test_documents_in_a_row_are_as_each_alone(name: str) -> None:
    model = model_of(name, document_mask=True).eval()
    ids = batch_of(model.config, 1).input_ids
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    segments = torch.cat([torch.zeros(5), torch.ones(7)]).long()[None]
    batch = replace(batch_of(model.config, 1), position_ids=places, segment_ids=segments)
    found = model.hidden(ids, None, batch).x
    for part in (slice(0, 5), slice(5, 12)):
        alone = model.hidden(ids[:, part], None).x
        torch.testing.assert_close(found[:, part], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_costs_are_those_of_the_model(name: str) -> None:
    """Parameters and products exactly, bytes within a tenth; and every parameter learns, in both precisions."""
    model = build(small("refined", **VARIANTS[name], layers=3))
    config = model.config
    assert num_parameters(config) == model.num_parameters()
    explicit = small("refined", **VARIANTS[name] | {"layers": 3, "attention": "auto"})
    assert counted(explicit, 2, backward=False) == 2 * forward_flops(explicit)
    if name == "chunked":  # whose gradient step has no backward pass
        assert counted(explicit, 2, backward=True) == training_flops_per_token(explicit) * 2 * explicit.context
    larger = small("refined", **VARIANTS[name] | {"width": 48, "context": 40})
    kept = activations(larger, 3, 2)
    assert kept.kept(checkpointing=False) + kept.loss == pytest.approx(measure(larger, 2), rel=0.1)
    for precision in (torch.float32, torch.bfloat16):
        model = open_masks(build(config)).to(precision)
        output = model(batched(model))
        output.loss.backward()
        assert all(value.isfinite().all() for value in output.metrics.values())
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["chunked", "chunked_gates"])
def test_a_step_that_is_computed_again_or_traced_gives_the_same(name: str) -> None:
    """Activation checkpointing and compiling, with the gradient step on, which needs no gradient of torch's."""
    plain, recomputed, traced = (model_of(name).float() for _ in range(3))
    checkpoint_activations(recomputed)
    torch._dynamo.reset()
    for layer in layers(traced) if name == "chunked" else ():
        layer.compile(backend="eager", fullgraph=True)
    for model in (plain, recomputed, traced):
        model(batched(model)).loss.backward()
    for other in (recomputed, traced):
        for one, again in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(again.grad, one.grad, rtol=0, atol=0)


def test_the_gradient_step_follows_the_gradient_and_helps() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 12, 16, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(VOCABULARY, 16, generator=generator, dtype=torch.float64) * 0.1
    ids = torch.randint(VOCABULARY, (40, 12), generator=generator)
    [expected] = torch.autograd.grad(surprise(x, ids, table).sum(), x)
    torch.testing.assert_close(surprise_gradient(x, ids, table), expected, rtol=1e-9, atol=1e-12)
    stepped = Descent()(x, ids, table)
    assert (surprise(stepped, ids, table) < surprise(x, ids, table)).double().mean() > 0.95


def test_re_weighting_starts_near_to_leaving_vectors_as_they_are_and_stays_among_those_that_are_visible() -> None:
    config = small("refined", **VARIANTS["chunked"])
    torch.manual_seed(0)
    reweighting, x = Reweighting(config).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.eye(12, dtype=torch.bool).expand(1, 1, -1, -1)
    torch.testing.assert_close(reweighting(x, mask), x)  # none but itself
    moved = reweighting(x, torch.ones_like(mask))
    assert 0 < (moved - x).norm() / x.norm() < 0.15


def test_each_step_draws_anew() -> None:
    model = build(small("refined", refine={"chunk": 4, "steps": 3}, learned_dropout=_OFF, dropout=0.5))
    assert isinstance(model.backbone, Refined)
    [step], batch, met = model.backbone.refiner, batched(model), list[Tensor]()
    assert isinstance(step, Refiner)
    step.layer.ff_dropout.register_forward_hook(lambda _, given, found: met.append(given[1]))
    model(batch)
    assert len({tuple(keys.tolist()) for keys in met}) == 3


def thinking(model: TokenModel, steps: int) -> TokenModel:
    """The same weights with another K."""
    return used_with(model, [f"model.refine.steps={steps}"])


def test_any_number_of_steps_has_the_same_weights_and_stays_finite() -> None:
    model = model_of("chunked")
    longer = thinking(model, 16)
    metrics = longer(batched(longer)).metrics
    changes = [float(metrics[f"refine_change/{k:02d}"]) for k in range(1, 17)]
    assert all(0 < change < 100 for change in changes)
    losses = [thinking(model, k).eval()(batched(model)).loss.item() for k in (1, 4, 5)]
    assert losses[1] == model.eval()(batched(model)).loss.item()
    assert len(set(losses)) == 3


def test_without_a_step_it_is_an_encoder_decoder() -> None:
    model = model_of("no_steps", learned_dropout=_OFF).eval()
    backbone, batch = model.backbone, batched(model, 1)
    assert isinstance(backbone, Refined)
    embedded, source = model._read(batch.input_ids, None, batch)
    assert source is not None
    read = embedded.tokens
    for layer in backbone.encoder:
        read = layer(read, None, None, source.embedded.visible)[0]
    x = embedded.tokens
    for layer in backbone.decoder:
        x = layer(x, backbone.null(read), None, None, embedded.visible, source.across)[0]
    torch.testing.assert_close(model(batch.input_ids), model.token_embed(model.final_norm(x)), rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_token_by_token_is_what_one_pass_over_the_text_gives(name: str) -> None:
    """Side by side, of different lengths and phases, one of which ends early; up to the context and beyond."""
    model = model_of(name).eval()
    ids = batch_of(model.config, 4).input_ids
    prompts = [ids[row, :length] for row, length in enumerate((1, 5, 7, 4))]
    generation = Generation(model, prompts, Sampling(temperature=0.0))
    texts = [prompt.tolist() for prompt in prompts]
    for turn in range(9):
        if turn == 3:
            generation.end(1)
        found = generation.step()
        [drawn] = generation.drawn
        hidden = max(map(len, texts)) - model.config.context
        for number, logits in zip(drawn.numbers, drawn.logits[:, 0], strict=True):
            start = max(0, hidden - (max(map(len, texts)) - len(texts[number])))
            text = torch.tensor(texts[number][start:])[None]
            prefix = None
            if model.config.reads_prompt:
                prefix = torch.tensor([text.shape[1] if start else len(prompts[number])])
            batch = replace(batch_of(model.config, 1), input_ids=text, prefix_lengths=prefix)
            expected = model.predict(text, None, batch)[0, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
        for number, tokens in found.items():
            texts[number] += tokens
    assert [len(text) for text in texts] == [10, 8, 16, 13]


def test_of_a_text_that_grows_each_chunk_is_read_once() -> None:
    model: Any = model_of("chunked").eval()
    chunk, read = model.config.refine.chunk, list[int]()
    model.backbone.encoder[0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    generation = Generation(model, [torch.tensor([1])], Sampling(temperature=0.0))
    for _ in range(2 * chunk):
        generation.step()
    assert read == [chunk, chunk]


def test_spans_are_learned_within_a_text_and_memory_is_read_by_a_softmax() -> None:
    model = build(small("refined", refine={"chunk": 4}, weights={"kind": "adaptive_span", "span_init": 0.3}))
    assert num_parameters(model.config) == model.num_parameters()
    assert model(batch_of(model.config)).loss.isfinite()


@pytest.mark.drill
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_step_that_is_supervised_each_time_becomes_an_operator(seed: int) -> None:
    """It is taken once more than in training; with one step, or with the last one supervised, nothing like it."""
    each, one, last = (pointer_chasing.accuracy(*arm, seed) for arm in pointer_chasing.ARMS.values())
    assert min(each[:3]) >= 0.98
    assert each[3] >= 0.8
    assert one[0] >= 0.98
    assert one[1] <= 0.6
    assert max(last[:2]) <= 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refine": {"chunk": 12}}, "refine.chunk=12: the decoder reads finished chunks.* such as 3"),
        ({"refine": {"form": "prefix", "chunk": 4}}, "refine.chunk=4 is for refine.form=chunked"),
        ({"refine": {"chunk": 4, "temperature": 1.0}}, "refine.temperature=1 is for refine.reweight=true"),
        ({"refine": {"chunk": 4, "steps": 0, "gradient": True}}, "refine.steps=0 takes no step"),
        (
            {"refine": {"chunk": 4}, "pattern": {"kind": "window", "window": 3}},
            "pattern.kind=window: the decoder reads",
        ),
        ({"refine": {"chunk": 4}, "norm": "batchnorm"}, "norm=batchnorm"),
    ],
)
def test_what_cannot_be_refined_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("refined", **changes)


def test_a_form_has_its_objectives() -> None:
    chunked, prefix = (small("refined", refine=of) for of in ({"chunk": 4}, {"form": "prefix"}))
    chunked.check_objective("causal")
    prefix.check_objective("pairs")
    with pytest.raises(ValueError, match=r"refine.form=chunked, which reads chunks.*or model.refine.form=prefix"):
        chunked.check_objective("prefix")
    with pytest.raises(ValueError, match="take data.objective=prefix or pairs, or model.refine.form=chunked"):
        prefix.check_objective("causal")
    with pytest.raises(ValueError, match="take data.objective=causal or prefix or pairs"):
        prefix.check_objective("masked")
