"""XLNet: two streams over a random order against the masks of the paper, what they may know, and gaps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.backbone import one_stream
from model.architectures.token_model import TokenModel
from model.architectures.two_stream.model import ContentAndQuery, TwoStreams
from model.attention import forms
from model.attention.attention import CausalAttention
from model.batch import Batch
from model.generation.sampling import Sampling
from model.layers.noise import sample_keys
from pretrain.inference.infilling import fill
from tests.model.helpers import VOCABULARY, batch_of, build, in_order, open_masks, small, variant

OFF = {"enabled": False}
ALSO: dict[str, dict[str, Any]] = {
    "entmax": {"weights": {"kind": "entmax"}},
    "l0": {"learned_dropout": OFF, "l0": {"enabled": True, "sites": ["dec_ff", "dec_sa", "embed"]}},
}
NAMES = ("two_stream", "two_stream_modern", "two_stream_embed", *ALSO)


def model_of(name: str, **changes: Any) -> TokenModel:
    """In float64, with masks that are open in part."""
    more = ALSO.get(name, {}) | changes
    return open_masks(build(variant("two_stream" if name in ALSO else name, **more))).double()


def ordered(model: TokenModel, rows: int = 1, targets: int | None = None) -> tuple[Batch, Tensor]:
    """A batch in random orders, and these, [B, T + 1]."""
    batch = batch_of(model.config, rows)
    ids = torch.randint(VOCABULARY, (rows, model.config.context + 1), generator=torch.Generator().manual_seed(4))
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)).argsort(dim=1)
    return in_order(batch, ids, order, targets or model.config.lengths[1]), order


def as_any(module: Any) -> Any:
    """Without its type."""
    return module


def layers_of(model: TokenModel) -> nn.ModuleList:
    """Through which both streams go."""
    assert isinstance(model.backbone, ContentAndQuery)
    return model.backbone.layers


def by_masks(model: TokenModel, ids: Tensor, order: Tensor) -> Tensor:
    """Logits [T + 1, V] of each token of a text, in the text's order: equations 3 and 4 with a mask for each stream.

    Without learned dropout, pre-norm, learned positions.
    """
    rank = order.argsort()
    strictly, width = rank[None] < rank[:, None], model.config.width
    within = strictly | torch.eye(len(ids), dtype=torch.bool)
    assert isinstance(model.backbone, ContentAndQuery)
    start, table, heads = (
        model.backbone.query_start.vector,
        model.token_embed.weight,
        model.config.model_dump()["heads"],
    )
    places = model.position_embed.weight[: len(ids)]
    h, g = table[ids] + places, start.expand(len(ids), -1) + places
    for layer in map(as_any, layers_of(model)):
        content, query = (layer.attention.qkv(layer.attention_norm(x)).split(width, dim=-1) for x in (h, g))

        def attend(q: Tensor, mask: Tensor, kv: tuple[Tensor, ...] = content) -> Tensor:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, *kv[1:]))
            scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            return (scores.softmax(-1).nan_to_num() @ v).transpose(0, 1).flatten(1)

        h, g = (x + layer.attention.out(attend(q[0], m)) for x, q, m in ((h, content, within), (g, query, strictly)))
        h, g = (x + layer.ff(layer.ff_norm(x)) for x in (h, g))
    return functional.linear(model.final_norm(g), table)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["auto", "explicit"])
def test_the_order_of_reading_is_the_masks_of_the_paper(attention: str) -> None:
    """All that are predicted, but the first, which sees nothing."""
    model = model_of("two_stream", learned_dropout=OFF, attention=attention)
    for targets in (12, 5, 1):
        batch, order = ordered(model, targets=targets)
        ids = torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1).gather(1, order.argsort())
        expected = by_masks(model, ids[0], order[0])[order[0, -targets:]]
        found = model.predict(batch.input_ids, None, batch)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "learned_dropout": OFF}], ids=str)
def test_in_the_texts_order_content_is_that_of_a_decoder_bit_for_bit(changes: dict[str, Any]) -> None:
    """Its logits, were they taken from content; with masks, too."""
    model = open_masks(build(small("two_stream", **changes))).eval()
    decoder = build(small("decoder_only", **changes)).eval()
    weights = {name: of for name, of in model.state_dict().items() if name != "backbone.query_start.vector"}
    if "position_embed.weight" in weights:
        weights["position_embed.weight"] = weights["position_embed.weight"][:-1]
    decoder.load_state_dict(weights)
    ids = batch_of(decoder.config).input_ids
    embedded, _ = model._read(ids, None, None)
    content, _ = one_stream(layers_of(model), embedded, None)
    assert torch.equal(model.token_embed(model.final_norm(content[:, :12])), decoder(ids))


def changes(model: TokenModel, mode: str) -> Tensor:
    """Largest change of each logit [T + 1, n] when a token changes, both in the order in which they are read."""
    batch, order = ordered(model)
    whole = torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)
    ids = whole.repeat(whole.shape[1] + 1, 1)  # row t changes token t; the last one none
    for place in range(whole.shape[1]):
        ids[place, place] = (ids[place, place] + 1) % VOCABULARY
    keys = sample_keys(batch.seed, batch.step, batch.samples).repeat(len(ids)) if mode == "train" else None
    assert batch.query_positions is not None
    more: dict[str, Any] = {
        "position_ids": order[:, :-1].repeat(len(ids), 1),
        "query_positions": batch.query_positions.repeat(len(ids), 1),
    }
    with torch.no_grad():
        logits = model.predict(ids[:, :-1], keys, replace(batch, labels=ids[:, -len(batch.labels[0]) :], **more))
    return (logits[:-1] - logits[-1]).abs().amax(dim=-1)


def later(change: Tensor) -> Tensor:
    """Of `changes`, those of what comes at its own place in the order or behind it."""
    return change.tril(change.shape[1] - len(change))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_no_query_knows_its_own_token_or_what_is_read_later(name: str, mode: str) -> None:
    change = changes(model_of(name), mode)
    assert later(change).max() == 0.0
    assert (change + torch.ones_like(change).tril(change.shape[1] - len(change))).min() > 0, "all before it is heard of"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "violation", ["a query sees its own token", "content sees what is read later", "attention sees all"]
)
def test_the_check_catches(name: str, mode: str, violation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own token is the content behind that which a query stands at."""
    rule, attend = forms._lower, CausalAttention.forward

    def further(queries: int, keys: int, device: torch.device) -> Tensor:
        of_content = queries == keys
        if of_content != violation.startswith("content"):
            return rule(queries, keys, device)
        return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries + 1)

    def leaky(self: CausalAttention, *given: Any) -> Tensor:
        return attend(self, *given) + given[2].sum(dim=(1, 2), keepdim=True)

    if violation == "attention sees all":
        monkeypatch.setattr(CausalAttention, "forward", leaky)
    else:
        monkeypatch.setattr(forms, "_lower", further)
        monkeypatch.setattr(forms.Asking, "of", classmethod(_formed))
    assert later(changes(model_of(name, permutation={"share": 0.4}), mode)).max() > 1e-9


def _formed(cls: Any, length: int, count: int, device: torch.device) -> forms.Asking:
    """With masks where the kernels need none, too."""
    return Masked(length, forms._lower(count, length, device), device)


class Masked(forms.Asking):
    def attend(self, kernel: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By the dense mask."""
        return kernel(query, key, value, self.dense(), False)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_gaps_are_filled_as_whole_passes_would(name: str) -> None:
    """Up to one token more than the context; each likeliest token of all that was known, wherever it stands."""
    model = model_of(name).eval()
    assert isinstance(model, TwoStreams)
    text = torch.randint(VOCABULARY, (13,), generator=torch.Generator().manual_seed(1))
    text[[0, 4, 5, 6, 12]] = -1
    found = list(fill(model, text, Sampling(temperature=0.0), eos_id=3))
    assert [token.place for token in found] == [0, 4, 5, 6, 12]
    known = [place for place in range(13) if text[place] >= 0]
    for token in found:
        places = torch.tensor([[*known, token.place]])
        batch = replace(
            batch_of(model.config, 1),
            position_ids=places[:, :-1],
            query_positions=places[:, -1:],
            labels=places[:, -1:],
        )
        logits = model.predict(text[known][None], None, batch)[0, -1]
        logits[3] = -torch.inf
        torch.testing.assert_close(token.logits, logits, rtol=0, atol=1e-12)
        assert token.token == int(logits.argmax())
        text[token.place] = token.token
        known.append(token.place)
    with pytest.raises(ValueError, match="0 tokens of 3 are known"):
        list(fill(model, torch.full((3,), -1), Sampling()))


def test_fixed_windows_in_fixed_orders_are_learned_by_heart() -> None:
    model = build(small("two_stream", layers=1, learned_dropout=OFF, permutation={"share": 1 / 3}))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    batch, _ = ordered(model, rows=8)
    for _ in range(60):
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": {"kind": "window", "window": 3}}, "pattern.kind=window: a query would see what is near"),
        ({"weights": {"kind": "adaptive_span"}}, "weights.kind=adaptive_span: a query would see its span"),
        ({"scores": {"kind": "synthesizer"}}, "scores.kind=synthesizer: the two streams share keys"),
        ({"document_mask": True}, "document_mask: two_stream reads all tokens of a row in one random order"),
        ({"recurrence": {"steps": 2}}, "the layers of two_stream are applied once"),
        ({"norm": "batchnorm"}, "norm=batchnorm"),
        ({"add_next_position": True}, "add_next_position: two_stream reads all tokens"),
        ({"permutation": {"share": 0.0}}, "greater than 0"),
        ({"learned_dropout": {"sites": ["enc_ff"]}}, "two_stream has no site enc_ff"),
    ],
)
def test_what_has_no_order_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("two_stream", **changes)


def test_a_random_order_is_its_only_objective() -> None:
    config = small("two_stream")
    config.check_objective("permutation")
    with pytest.raises(ValueError, match="data.objective=causal does not fit .* take data.objective=permutation"):
        config.check_objective("causal")
