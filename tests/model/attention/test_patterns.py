"""Patterns of attention: what is seen is what they say, in whatever form it is computed, and nothing more."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves

from model.architectures.token_model import TokenModel
from model.attention import forms, softmax, visibility, weights
from model.attention.cache import Cache
from model.attention.ring import Ring
from model.attention.rule import Rows, Rule
from model.batch import Batch
from model.config import pattern_config
from model.config.model_config import ModelConfig
from model.config.pattern_config import FULL, Pattern, PatternConfig, keys_seen
from model.layers.noise import sample_keys
from tests.model.attention.test_cache import cached, full
from tests.model.attention.test_causality import leak
from tests.model.attention.test_documents import packed
from tests.model.helpers import PATTERNED, PATTERNED_BOTH_WAYS, VOCABULARY, batch_of, build, open_masks, small, variant

IN_BLOCKS = ("sinks", "fixed_heads")
"""The plain form of FlexAttention takes seconds."""
UNIONS = ("strided", "bert_strided")
FORMS_OF = {"blocks": IN_BLOCKS, "union": UNIONS}
"""All others are for every pattern."""


def model_of(name: str, **changes: Any) -> TokenModel:
    return open_masks(build(variant(name, **changes))).double()


def plain(pattern: dict[str, Any], seed: int = 0, **changes: Any) -> TokenModel:
    """Two layers of nothing but attention and feed forward."""
    config = small("decoder_only", learned_dropout={"enabled": False}, pattern=pattern, **changes)
    return build(config, seed).double().eval()


def in_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in this one what can be, and all else densely."""

    def chosen(self: Pattern, tokens: int, *, documents: bool = False, prefix: bool = False, both_ways: bool) -> str:
        counted = self.sinks or self.block or self.summary
        takes = not (self.full or self.stride or self.marked or (form == "gathered" and self.summary))
        takes = bool(self.window and self.stride) if form == "union" else takes
        return form if takes and not prefix and not (documents and counted) else "dense"

    monkeypatch.setattr(Pattern, "form", chosen)
    forms._shared.cache_clear()


def mask_in_blocks(rows: Rows, patterns: Any, **_: bool) -> forms.Mask:
    masks = tuple(rows.blocks(pattern) for pattern in patterns)
    return masks[0] if len(masks) == 1 else forms.Halves(masks)


FORMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "dense": lambda patch: in_form("dense", patch),
    "gathered": lambda patch: in_form("gathered", patch),
    "chunks": lambda patch: in_form("chunks", patch),
    "union": lambda patch: in_form("union", patch),
    "blocks": lambda patch: patch.setattr(visibility, "mask_of", mask_in_blocks),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pattern_config, "CHUNK", 5)
    monkeypatch.setattr(pattern_config, "FEWEST", 1)
    forms._shared.cache_clear()
    yield
    forms._shared.cache_clear()


def batches(config: ModelConfig) -> dict[str, Batch]:
    """Texts alone, documents side by side, prefixes: as far as the architecture takes them."""
    made = {"texts": batch_of(config)}
    if not config.traits.two_sequences:
        made["documents"] = packed(config)
    if "prefix" in config.traits.objectives:
        made["prefixes"] = replace(packed(config), prefix_lengths=torch.tensor([5, 1, 3]))
    return made


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "form"),
    [(n, form) for n in (*PATTERNED, *PATTERNED_BOTH_WAYS) for form in FORMS if n in FORMS_OF.get(form, [n])],
)
def test_every_form_gives_the_same(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same gradients, where FlexAttention has them."""
    # Weights that are formed are so over all keys, whatever the form.
    kernel = {"attention": "auto"} if form == "blocks" or variant(name).attention == "explicit" else {}
    model = model_of(name, dropout=0.0, attention_dropout=0.0, **kernel).eval()

    def computed(batch: Batch) -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(form != "blocks"):
            logits = model.predict(batch.input_ids, None, batch)
        if form == "blocks":
            return [logits]
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    made = batches(model.config)
    if form == "blocks":
        made = {"documents": made["documents"]}
    expected = {kind: computed(batch) for kind, batch in made.items()}
    FORMS[form](monkeypatch)
    for kind, batch in made.items():
        for found, wanted in zip(computed(batch), expected[kind], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12, msg=lambda text: f"{kind}: {text}")  # noqa: B023


def test_a_model_that_was_used_can_be_trained() -> None:
    """No backward pass takes tensors that inference mode made, such as masks for all batches."""
    model = plain({"kind": "fixed", "stride": 3})
    batch = batch_of(model.config)
    rows = Rows(torch.Size((2, 12)), torch.device("cpu"), causal=False)
    sparse = [Pattern(window=3), Pattern(block=3, summary=1, period=3), Pattern(stride=3), Pattern(window=3, stride=3)]
    with torch.inference_mode():
        model(batch)
        masks: list[Any] = [forms.mask_of(rows, (pattern,), in_blocks=False, dense=False) for pattern in sparse]
        blocks = forms.mask_of(rows, (Pattern(window=4),), in_blocks=True, dense=False)
        masks.append(weights._blocks(rows, Pattern(window=3)))
    model(batch).loss.backward()
    assert isinstance(blocks, BlockMask)
    made = [x for x in tree_leaves([masks, blocks.as_tuple()]) if isinstance(x, Tensor)]
    assert len(made) > 12 and not any(x.is_inference() for x in made)


def test_each_form_is_taken_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above met all of them."""
    rows = Rows(torch.Size((2, 12)), torch.device("cpu"))
    taken = {
        Pattern(window=3): forms.Gathered,
        Pattern(window=3, sinks=2): forms.Gathered,
        Pattern(block=3): forms.Gathered,
        Pattern(stride=3): forms.Strided,
        Pattern(block=3, summary=1, period=3): forms.Chunks,
        Pattern(summary=1, period=3): forms.Chunks,
        Pattern(window=3, stride=3): Tensor,
        Pattern(window=4): Tensor,
        Pattern(window=12): type(None),
    }
    for pattern, form in taken.items():
        assert isinstance(forms.mask_of(rows, (pattern,), in_blocks=False, dense=False), form), pattern
        assert isinstance(forms.mask_of(rows, (pattern,), in_blocks=False, dense=True), Tensor | None)
    wide = Pattern(window=300)
    assert [wide.form(tokens) for tokens in (300, 1199, 1200)] == ["full", "dense", "chunks"]
    monkeypatch.undo()
    assert [Pattern(window=3).form(tokens) for tokens in (3, 255, 256)] == ["full", "dense", "gathered"]
    assert [Pattern(window=16, stride=16).form(tokens) for tokens in (255, 256, 2048)] == ["dense", "union", "union"]
    assert [Pattern(window=wide, stride=wide).form(512) for wide in (2, 64, 128)] == ["dense", "union", "dense"]
    both = {tokens: Pattern(window=16, stride=16).form(tokens, both_ways=True) for tokens in (256, 512)}
    assert both == {256: "dense", 512: "union"}


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_and_a_stride_share_one_softmax(causal: bool) -> None:
    """Of texts alone, and of texts behind pads, in rows of no whole number of windows; with their gradients."""
    pattern, shape = Pattern(window=4, stride=4), torch.Size((3, 14))
    positions = torch.arange(14) - torch.tensor([[0], [3], [9]])
    for behind in ((), (positions < 0, positions)):
        rows = Rows(shape, torch.device("cpu"), causal, *behind)
        union = forms.Union.of(rows, pattern)
        given = [torch.randn(3, 2, 14, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        query, key, value = given
        expected = softmax.plain(query, key, value, rows.dense((pattern,)), False)
        found = union.attend(softmax.plain, query, key, value)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        slopes = [torch.autograd.grad((x * expected.detach().cos()).sum(), given) for x in (found, expected)]
        torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)
        twice = union._replace(far=union.far | torch.eye(4, dtype=torch.bool))
        assert (twice.attend(softmax.plain, query, key, value) - expected).abs().max() > 1e-2, "the check itself"


@pytest.mark.parametrize("attention", ["auto", "flash", "explicit"])
@pytest.mark.parametrize("limit", [{"kind": "window", "window": 12}, {"kind": "fixed", "stride": 12}], ids=str)
def test_at_its_limit_a_pattern_is_full_attention_bit_for_bit(limit: dict[str, Any], attention: str) -> None:
    model, other = build(small(attention=attention, pattern=limit)), build(small(attention=attention))
    for batch in batches(model.config).values():
        found, expected = model(batch), other(batch)
        assert torch.equal(found.loss, expected.loss)
        found.loss.backward()
        expected.loss.backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert one.grad is not None
            assert two.grad is not None
            assert torch.equal(one.grad, two.grad)
        rows = Rows(batch.input_ids.shape, torch.device("cpu"), True, batch.segment_ids, batch.position_ids)
        [pattern] = model.config.patterns[0]
        assert torch.equal(rows.dense((pattern,)), rows.dense())


def influence(model: TokenModel, length: int) -> Tensor:
    """[k, q] bool: whether the logits at q change when token k does."""
    ids = batch_of(model.config, sequences=1).input_ids[:, :length].repeat(length + 1, 1)
    for place in range(length):
        ids[place, place] = (ids[place, place] + 1) % VOCABULARY
    with torch.no_grad():
        logits = model(ids)
    change = (logits[:-1] - logits[-1]).abs().amax(dim=-1)
    return change > 0


def expected_influence(config: ModelConfig, length: int) -> Tensor:
    """[k, q] bool, by the product of what each layer's heads see together, with the residual path."""
    reach = torch.eye(length, dtype=torch.bool)
    for layer in range(config.layers):
        patterns = config.pattern.of_layer(layer, config.context)  # type: ignore[attr-defined]
        seen = [[k <= q and any(p.sees(q, k) for p in patterns) for k in range(length)] for q in range(length)]
        reach = (torch.tensor(seen).double() @ reach.double()) > 0
    return reach.T


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", PATTERNED)
def test_a_prediction_depends_on_what_the_layers_see_and_on_nothing_else(name: str, layers: int) -> None:
    options = PATTERNED[name]["pattern"]
    if layers == 1 and ("full_every" in options or options.get("merge") == "alternate"):
        return  # which need two
    model = plain(options, layers=layers)
    assert torch.equal(influence(model, 12), expected_influence(model.config, 12))


def test_the_mask_of_a_layer_sees_what_the_layer_sees() -> None:
    """Of `dec_sa`: an attention more, so one window further."""
    masks = {"sites": ["dec_sa"], "eval_rounding": "none"}
    model = build(small("decoder_only", layers=1, pattern=PATTERNED["window"]["pattern"], learned_dropout=masks))
    reach = influence(open_masks(model).double().eval(), 12)
    distance = torch.arange(12) - torch.arange(12)[:, None]
    assert torch.equal(reach, (distance >= 0) & (distance < 2 * 3 - 1))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", PATTERNED)
def test_earlier_predictions_ignore_a_token(name: str, mode: str) -> None:
    before, after = leak(variant(name), mode)
    assert before < 1e-12
    assert after > 1e-3


@pytest.mark.parametrize("name", PATTERNED)
def test_the_check_catches_a_rule_that_sees_the_next_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: Rows, pattern: Pattern = FULL) -> Rule:
        return lambda b, h, q, k: (k <= q + 1) & pattern.sees(q, k) | (k == q + 1)

    monkeypatch.setattr(Rows, "rule", leaky)
    assert leak(variant(name), "eval")[0] > 1e-6


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [2, 6, 1, 3]], ids=str)
@pytest.mark.parametrize("name", PATTERNED)
def test_a_cache_changes_nothing(name: str, chunks: list[int]) -> None:
    model = model_of(name).eval()
    ids = batch_of(model.config).input_ids
    torch.testing.assert_close(cached(model, ids, chunks), full(model, ids, chunks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[5, 4, 1, 2], [1] * 12], ids=str)
@pytest.mark.parametrize("name", PATTERNED)
def test_a_text_in_a_padded_batch_is_the_text_alone(name: str, chunks: list[int]) -> None:
    model = model_of(name).eval()
    ids, padding = batch_of(model.config, sequences=4).input_ids, [0, 3, 7, 10]
    together = cached(model, ids, chunks, padding)
    for row, pads in enumerate(padding):
        alone = full(model, ids[row : row + 1, pads:], [1] * (12 - pads))[0]
        for step, end in enumerate(torch.tensor(chunks).cumsum(0).tolist()):
            if end > pads:
                torch.testing.assert_close(together[row, step], alone[end - pads - 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sinks", "globals", "fixed"])
def test_the_check_catches_positions_that_are_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Rows.rule
    monkeypatch.setattr(Rows, "rule", lambda self, pattern=FULL: made(replace(self, positions=None), pattern))
    monkeypatch.setattr(Ring, "of", lambda *_: None)
    model = model_of(name).eval()
    ids = batch_of(model.config, sequences=1).input_ids
    together = cached(model, ids, [12], [3])
    assert (together - full(model, ids[:, 3:], [9])).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["window", "sinks_alone", "strided_alternate"])
def test_a_ring_holds_no_more_than_the_window_and_the_sinks(name: str) -> None:
    model = model_of(name).eval()
    ids = batch_of(model.config).input_ids
    cache, sizes = Cache(torch.tensor([0, 2, 4]), 12), set()
    for part in ids.split([4, 1, 5, 1, 1], dim=1):
        cache.logits(model, part)
        sizes |= {
            (place.patterns[0], keys.shape[2], values.shape[2]) for (place, _), (keys, values) in cache._stored.items()
        }
    for pattern, *columns in sizes:
        held = 12 if pattern.stride else pattern.window + pattern.sinks
        assert columns == [held, held]


def test_rows_of_a_ring_are_reordered() -> None:
    model = model_of("sinks_alone").eval()
    ids, padding, order = batch_of(model.config).input_ids, torch.tensor([0, 2, 4]), torch.tensor([2, 0, 0])
    cache, fresh = Cache(padding, 12), Cache(padding[order], 12)
    cache.logits(model, ids[:, :6])
    cache.reorder(order)
    reordered = cache.logits(model, ids[order, 6:])
    torch.testing.assert_close(reordered, fresh.logits(model, ids[order]), rtol=0, atol=1e-12)


def test_noise_on_weights_is_that_of_each_head() -> None:
    """Halves of the heads are formed together where weights are dropped, so none draws the other's noise."""
    model = model_of("fixed_heads", learned_dropout={"enabled": False}).train()
    batch = batch_of(model.config)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    mask = visibility.visible_in(batch.input_ids, None, model.config).mask
    assert isinstance(mask, Tensor)
    assert mask.shape == (1, 2, 12, 12)
    assert not torch.equal(model.predict(batch.input_ids, keys), model.predict(batch.input_ids, None))


def product(*layers: Pattern, tokens: int = 64) -> bool:
    """Whether all earlier positions are reached through the layers, the first one first, without a residual path."""
    rows = Rows(torch.Size((1, tokens)), torch.device("cpu"))
    seen = [rows.dense((pattern,))[0, 0].double() for pattern in layers]
    reached = reduce(lambda so_far, layer: layer @ so_far, seen)
    return bool(((reached > 0) == torch.ones(tokens, tokens).tril().bool()).all())


def test_two_layers_reach_every_earlier_token() -> None:
    """Child et al. 2019, with stride 8 and summaries of 2: `fixed` in one order only, which is that of `alternate`."""
    near, far = PatternConfig(kind="strided", stride=8, merge="heads").of_layer(0, 64)
    assert product(near, far)
    assert product(far, near)
    block, ends = PatternConfig(kind="fixed", stride=8, summary=2, merge="heads").of_layer(0, 64)
    assert product(block, ends)
    assert not product(ends, block)
    turns = PatternConfig(kind="fixed", stride=8, summary=2, merge="alternate")
    assert [turns.of_layer(layer, 64) for layer in range(3)] == [(block,), (ends,), (block,)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNED)
def test_keys_that_are_counted_are_those_that_are_seen(name: str, causal: bool) -> None:
    rows = Rows(torch.Size((1, 64)), torch.device("cpu"), causal)
    patterns = PatternConfig(**PATTERNED[name]["pattern"]).of_layer(0, 64)
    row = rows.dense(patterns)[0, :, -1 if causal else 32].double()
    assert keys_seen(patterns, 64, causal) == row.sum(-1).mean()


def test_masks_are_made_once_for_all_layers_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = forms._made

    def counted(*args: Any) -> forms.Mask:
        made.append(args)
        return real(*args)

    monkeypatch.setattr(forms, "_made", counted)
    model = model_of("strided_alternate", layers=4)
    packed_batch = packed(model.config)
    for _ in range(2):
        model.predict(packed_batch.input_ids, None, packed_batch)
    assert len(made) == 2 * 2, "two patterns, two batches"


REFUSED = {
    "pattern.kind=window: how wide": {"kind": "window"},
    r"pattern\.window is for pattern\.kind=window, not full": {"window": 4},
    r"pattern\.sinks is for pattern\.kind=window, not strided": {"kind": "strided", "sinks": 4},
    r"pattern\.summary is for pattern\.kind=fixed, not strided": {"kind": "strided", "summary": 2},
    r"pattern\.stride is for pattern\.kind=strided or fixed": {"kind": "window", "window": 4, "stride": 2},
    r"full_every=1 makes every layer full": {"kind": "window", "window": 4, "full_every": 1},
    r"full_every=3: of 2 layers none would be full": {"kind": "window", "window": 4, "full_every": 3},
    r"globals takes different positions": {"kind": "window", "window": 4, "globals": [1, 1]},
    r"no text has a position 12, since context=12": {"kind": "window", "window": 4, "globals": [12]},
    r"sinks=13: a text has context=12 tokens": {"kind": "window", "window": 4, "sinks": 13},
    r"summary=5 is more than a block of 4": {"kind": "fixed", "summary": 5},
    r"stride=13 is more than context=12": {"kind": "strided", "stride": 13},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(pattern=REFUSED[message])


def test_turns_are_taken_by_the_layers_that_are_not_full() -> None:
    pattern = PatternConfig(kind="strided", stride=4, merge="alternate", full_every=2)
    seen = [pattern.of_layer(layer, 64) for layer in range(6)]
    near, far = (Pattern(window=4),), (Pattern(stride=4),)
    assert seen == [near, (FULL,), far, (FULL,), near, (FULL,)]


def test_a_text_may_be_shorter_than_its_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(8)[None]
    model = plain({"kind": "window", "window": 2, "sinks": 12}).eval()
    expected = model.predict(ids, None)
    monkeypatch.setattr(pattern_config, "FEWEST", 1)
    forms._shared.cache_clear()
    torch.testing.assert_close(model.predict(ids, None), expected)
    forms._shared.cache_clear()


def test_turns_need_layers_and_halves_an_even_number_of_heads() -> None:
    with pytest.raises(ValueError, match="merge=alternate takes turns between layers, so it needs layers >= 2"):
        small(layers=1, pattern={"kind": "fixed", "merge": "alternate"})
    with pytest.raises(ValueError, match="merge=heads gives half of the heads to each part, and heads=1 is odd"):
        small(heads=1, pattern={"kind": "fixed", "merge": "heads"})
