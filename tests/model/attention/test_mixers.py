"""Other weights and other scores of attention hold what a softmax holds: causality, caches, documents, gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.attention import weights
from model.attention.attention import SelfAttention
from model.attention.cache import Cache
from model.attention.linformer import Linformer
from model.attention.routing import routings
from model.attention.softmax import Softmax
from model.attention.visibility import CAUSAL
from model.attention.weights import AdaptiveSpan, Entmax, _Held, _Spanned
from model.costs.totals import activations
from model.layers.noise import sample_keys
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.attention import test_causality
from tests.model.attention.test_cache import cached, full
from tests.model.attention.test_causality import leak
from tests.model.attention.test_documents import ROWS, documents, packed
from tests.model.attention.test_patterns import influence, plain
from tests.model.helpers import MIXED, MIXED_BOTH_WAYS, batch_of, build, open_masks, small, variant

EVERY = {**MIXED, **MIXED_BOTH_WAYS}
APART = [name for name in EVERY if "bert_linformer" not in name and name != "bert_routing" and name[:2] != "t5"]


TABLES = ("dense", "first", "second", "table", "left", "right", "mixture", "key_slots", "value_slots", "slots.weight")


def opened(model: TokenModel) -> TokenModel:
    """As after training: scores that differ, parameters of heads that do."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in open_masks(model).named_parameters():
        if name.endswith(("qkv.weight", "query.weight", "key_value.weight")):
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        if name.endswith("alpha_logit"):
            torch.nn.init.normal_(parameter, std=1.0, generator=generator)
        if any(name.endswith(f"mixer.{table}") for table in TABLES):
            torch.nn.init.normal_(parameter, std=0.7, generator=generator)
        if name.endswith("mixer.share"):
            torch.nn.init.uniform_(parameter, 0.1, 0.6, generator=generator)
    return model.double()


def model_of(name: str, **changes: Any) -> TokenModel:
    return opened(build(variant(name, **changes)))


def check_padded(model: TokenModel, ids: Tensor, chunks: list[int], padding: list[int]) -> None:
    """That a row of `ids` [B, 12] behind so many pads, read by a cache in `chunks`, is predicted as it is alone."""
    together = cached(model, ids, chunks, padding)
    for row, pads in enumerate(padding):
        alone = full(model, ids[row : row + 1, pads:], [1] * (12 - pads))[0]
        for step, end in enumerate(torch.tensor(chunks).cumsum(0).tolist()):
            if end > pads:
                torch.testing.assert_close(together[row, step], alone[end - pads - 1], rtol=0, atol=1e-10)


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
    ids = batch_of(model.config, sequences=4).input_ids
    torch.testing.assert_close(cached(model, ids, chunks), full(model, ids, chunks), rtol=0, atol=1e-10)
    check_padded(model, ids, chunks, [0, 3, 7, 10])


@pytest.mark.parametrize("name", ["span_sinks", "routing_window"])
def test_pads_in_a_ring_see_one_another_however_little_is_seen(name: str) -> None:
    """Else they are NaN, which every later layer spreads."""
    model = model_of(name).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mixer.share"):
            torch.nn.init.zeros_(parameter)
    ids = batch_of(model.config, sequences=2).input_ids
    assert cached(model, ids, [11, 1], [0, 9]).isfinite().all()


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


TRACED = ("entmax", "span", "mixture", "bert_linformer", "routing")


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_learns_alike_when_layers_are_recomputed_or_traced(name: str) -> None:
    """As `engine.activation_checkpointing` and `engine.compile` do."""
    layers = 1 if name in TRACED and name != "bert_linformer" else 2  # which share slots
    plain, recomputed, traced = (model_of(name, layers=layers) for _ in range(3))
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


def test_spans_as_long_as_the_context_are_full_attention() -> None:
    full_one, spanned_one = (plain({}, weights=weights) for weights in ({}, {"kind": "adaptive_span", "ramp": 2}))
    spanned_one.load_state_dict(spanned_one.state_dict() | full_one.state_dict())
    ids = batch_of(full_one.config).input_ids
    torch.testing.assert_close(spanned_one.predict(ids, None), full_one.predict(ids, None), rtol=0, atol=1e-12)


def test_a_span_stays_between_0_and_all_and_comes_back() -> None:
    share = torch.tensor([-0.2, 0.5, 1.2], requires_grad=True)
    for direction, moved in ((1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, 0.0])):
        held: Tensor = _Held.apply(share, 0.0, 1.0)
        assert held.tolist() == pytest.approx([0.0, 0.5, 1.0])
        [gradient] = torch.autograd.grad((direction * held).sum(), share)
        assert gradient.tolist() == moved


def test_an_alpha_that_has_come_to_its_least_comes_back() -> None:
    """a = -9 is an alpha of 1.0001, which counts as 1.01."""
    mixer = Entmax(small("decoder_only", weights={"kind": "entmax"}), 2, "dec_sa/00")
    torch.nn.init.constant_(mixer.alpha_logit, -9.0)
    scores = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    first = mixer._normalised(scores, None, CAUSAL).amax(-1).sum()
    for direction in (1, -1):
        [slope] = torch.autograd.grad(direction * first, mixer.alpha_logit, retain_graph=True)
        assert bool((slope < 0).all() if direction < 0 else (slope == 0).all())


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_only", "parallel_encoder_decoder"])
def test_keys_that_no_span_reaches_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, in steps of 2 keys here: of texts, documents and padding, and of a text that is read step by step."""
    options = {"kind": "adaptive_span", "ramp": 1}
    config = small(architecture, weights=options, learned_dropout={"enabled": False}, document_mask=True)
    model, texts, asked = opened(build(config)), packed(config), list[int]()
    spans = [module for module in model.modules() if isinstance(module, AdaptiveSpan)]
    for module in spans:  # up to 0.96 tokens
        torch.nn.init.uniform_(module.share, 0.0, 0.08, generator=torch.Generator().manual_seed(len(module.name)))
    padding = (torch.arange(12) > 8).expand(3, -1)
    padded = replace(batch_of(config), segment_ids=-padding.long(), padding=padding)
    real = _Spanned.forward

    def forward(ctx: Any, scores: Tensor, *given: Any) -> Tensor:
        asked.append(scores.shape[-1])
        return real(ctx, scores, *given)

    def computed(trim: int) -> list[Tensor]:
        monkeypatch.setattr(weights, "TRIM", trim)
        asked.clear()
        model.zero_grad()
        keys = sample_keys(texts.seed, texts.step, texts.samples)
        hidden = [model.train().hidden(texts.input_ids, keys, batch).x for batch in (None, texts, padded)]
        hidden[2] = hidden[2][:, :9]
        torch.stack([(x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in hidden]).sum().backward()
        found = [*hidden, *(p.grad for p in model.parameters() if p.grad is not None)]
        if architecture != "encoder_only":
            found.append(cached(model.eval(), texts.input_ids, [5, 4, 1, 2], [0, 1, 3]))
        return found

    monkeypatch.setattr(_Spanned, "forward", forward)
    expected = computed(64)
    assert asked[0] == 12 and all(module.share.grad is not None and module.share.grad.any() for module in spans)
    found = computed(2)
    assert (asked[0], asked[-1]) == ((6, 6) if architecture == "encoder_only" else (4, 3)), "two and the one before"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(AdaptiveSpan, "reach", lambda _: 1)
    assert (computed(1)[0] - expected[0]).abs().max() > 1e-3, "the check itself"


def test_a_span_that_is_no_number_makes_a_loss_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any such weight does: a step that is skipped, and told of."""
    monkeypatch.setattr(weights, "TRIM", 2)
    model = plain({}, weights={"kind": "adaptive_span", "ramp": 1, "span_init": 0.0})
    assert model(batch_of(model.config)).loss.isfinite()
    for module in model.modules():
        if isinstance(module, AdaptiveSpan):
            torch.nn.init.constant_(module.share, torch.nan)
    assert model(batch_of(model.config)).loss.isnan()


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


def test_a_dense_synthesizer_whose_map_is_0_takes_the_mean_of_what_is_seen() -> None:
    model = model_of("dense")
    attention = next(module for module in model.modules() if isinstance(module, SelfAttention))
    torch.nn.init.zeros_(attention.attention.mixer.dense)  # type: ignore[arg-type]
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    value = attention.qkv(x)[..., -16:]
    expected = attention.out(value.cumsum(1) / torch.arange(1, 13)[:, None])
    torch.testing.assert_close(attention(x, None), expected)


@pytest.mark.parametrize(("part", "same"), [("random", True), ("factorised_random", True), ("dense", False)])
def test_a_random_synthesizer_weighs_all_texts_alike(part: str, same: bool) -> None:
    model = opened(build(small("decoder_only", scores={"kind": "synthesizer", "parts": [part]})))
    attention = next(module for module in model.modules() if isinstance(module, SelfAttention))
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    query, key, _ = attention.qkv(x).split(attention._sizes, dim=-1)
    first, second = attention.attention.weights(query, key)
    assert torch.equal(first, second) == same
    assert first.std(-1).min() >= 0 < first[:, -1].std()


def test_of_a_synthesizer_values_alone_are_kept() -> None:
    model, cache = model_of("dense").eval(), Cache(torch.tensor([0, 2]), 12)
    cache.logits(model, batch_of(model.config, sequences=2).input_ids)
    kept = {str(vars(place)["name"]): keys.numel() for (place, _), (keys, _) in cache._stored.items()}
    assert kept["dec_sa/00"] == kept["enc_sa/01"] == 0 < kept["cross/00"]


SHARING = {"none": (2, 2), "headwise": (2, 1), "key_value": (1, 1), "layerwise": (1, 1)}
"""Tables of a layer, and heads of each."""


@pytest.mark.parametrize("sharing", SHARING)
def test_linformer_is_a_softmax_over_sums_and_with_a_slot_for_each_key_full_attention(sharing: str) -> None:
    """The sums of each head written out; on a shorter text, too, to which padding adds nothing."""
    shape: dict[str, Any] = {"learned_dropout": {"enabled": False}, "heads": 2}
    full_one = opened(build(small("encoder_only", **shape)))
    model = build(
        small("encoder_only", scores={"kind": "linformer", "slots": 12, "sharing": sharing}, **shape)
    ).double()
    tables = {name: table for name, table in model.state_dict().items() if "slots" in name}
    count, heads = SHARING[sharing]
    assert len(tables) == (1 if sharing == "layerwise" else 2 * count)
    assert {tuple(table.shape) for table in tables.values()} == {(2, 12, 12) if heads == 2 else (12, 12)}
    mixers = [module for module in model.modules() if isinstance(module, Linformer)]
    query, key, value = (torch.randn(3, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    padding = (torch.arange(9) > 6).expand(3, -1)
    for layer, mixer in enumerate(mixers):
        own = [tables[name] for name in sorted(tables) if len(tables) == 1 or f".{layer}." in name]
        found = mixer(query, key, value, None, CAUSAL._replace(causal=False, padding=padding))
        for head in range(2):
            e, f = (table[head] if heads > 1 else table for table in (own[0], own[-1]))
            slots = e[:, :7] @ key[:, head, :7]
            weights = (query[:, head] @ slots.mT * 8**-0.5).softmax(-1)
            torch.testing.assert_close(found[:, head], weights @ (f[:, :7] @ value[:, head, :7]))
    eye = {name: torch.eye(12, dtype=torch.float64).expand(table.shape) for name, table in tables.items()}
    model.load_state_dict(full_one.state_dict() | eye)
    ids = batch_of(model.config).input_ids
    torch.testing.assert_close(model.predict(ids, None), full_one.predict(ids, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MIXED_BOTH_WAYS if name[:2] != "t5"])
def test_a_padded_text_that_is_read_both_ways_is_the_text_alone(name: str) -> None:
    """In training it counts no more than that either."""
    model = model_of(name, dropout=0.0, learned_dropout={"enabled": False})
    batch = batch_of(model.config)
    padding = (torch.arange(12) > 8).expand(3, -1)
    padded = replace(batch, segment_ids=-padding.long(), padding=padding)
    alone = replace(batch, input_ids=batch.input_ids[:, :9], labels=batch.labels[:, :9])
    found, sums = [], []
    for given in (padded, alone):
        keys = sample_keys(batch.seed, batch.step, batch.samples)
        found.append(model.train().predict(given.input_ids, keys, given)[:, :9])
        sums.append([routing.sums.clone() for routing in routings(model)])
        for routing in routings(model):
            routing.sums.zero_()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("name", ["t5_linformer", "bert_linformer", "bert_linformer_alone"])
def test_padding_adds_nothing_to_slots(name: str) -> None:
    """The last three tokens of the text that is read are padding: nothing depends on them but what stands there."""
    model = model_of(name).eval()
    batch = batch_of(model.config)
    padding = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    padding[:, -3:] = True
    one = replace(
        batch, segment_ids=-padding.long(), input_ids=batch.input_ids.masked_fill(padding, 1), padding=padding
    )
    other = replace(one, input_ids=batch.input_ids.masked_fill(padding, 2))
    found = [model.predict(b.input_ids, None, b) for b in (one, other)]
    seen = slice(None) if name.startswith("t5") else slice(0, -3)
    torch.testing.assert_close(found[0][:, seen], found[1][:, seen], rtol=0, atol=1e-12)
    assert (
        model.predict(other.input_ids, None, replace(other, padding=None, segment_ids=None)) - found[1]
    ).abs().max() > 1e-6


def test_slots_would_tell_earlier_tokens_of_later_ones() -> None:
    """Why it is refused for causal models: the causal mask over slots does not help."""
    config = small("encoder_only", scores={"kind": "linformer", "slots": 12}, learned_dropout={"enabled": False})
    mixer = Linformer(config, "dec_sa/00").double()
    assert mixer.value_slots is not None
    query, key, value = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    key_slots, value_slots = (
        torch.einsum("st,bhtd->bhsd", table, x) for table, x in ((mixer.key_slots, key), (mixer.value_slots, value))
    )
    changed = value.clone()
    changed[:, :, -1] += 1
    others = torch.einsum("st,bhtd->bhsd", mixer.value_slots, changed)
    causal = [Softmax(config)(query, key_slots, v, None, CAUSAL) for v in (value_slots, others)]
    assert (causal[0] - causal[1])[:, :, :-1].abs().max() > 1e-2


def test_what_linformer_keeps_grows_with_the_text_and_not_with_its_square() -> None:
    kept = {}
    for kind in ("linformer", "dot"):
        counts = []
        for context in (256, 512, 1024):
            scores = {"kind": kind, "slots": 32} if kind == "linformer" else {}
            config = small(
                "encoder_only", attention="explicit", context=context, scores=scores, learned_dropout={"enabled": False}
            )
            counts.append(activations(config, 1, 4).layers)
        kept[kind] = (counts[2] - counts[1]) / (counts[1] - counts[0])
    assert kept["linformer"] == pytest.approx(2.0, rel=0.01)
    assert kept["dot"] > 3.5
