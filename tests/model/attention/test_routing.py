"""Routing: what a cluster sees, sorted and masked, kept and moved (Roy et al. 2021)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.token_model import TokenModel
from model.attention.attention import SelfAttention
from model.attention.routing import Routing, _dropped, routings
from model.attention.visibility import CAUSAL
from model.config.scores_config import ScoresConfig
from model.layers.noise import sample_keys
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.attention import test_causality
from tests.model.attention.test_cache import cached
from tests.model.attention.test_causality import leak
from tests.model.attention.test_documents import packed
from tests.model.attention.test_mixers import check_padded, gradients, model_of, opened
from tests.model.helpers import batch_of, build, small, variant


def routing_of(model: TokenModel, index: int = 0) -> Routing:
    return routings(model)[index]


def test_with_one_cluster_routed_heads_see_everything_but_themselves() -> None:
    """Shared queries and keys, of length sqrt(d); the first token has nothing else to see."""
    scores = {"kind": "routing", "clusters": 1, "routed_heads": 2}
    model = opened(build(small("decoder_only", scores=scores)))
    mixer, query = routing_of(model), torch.randn(3, 12, 16, dtype=torch.float64)
    routed, key = mixer.routed(query, query[..., :0])
    assert torch.equal(routed, key)
    heads = functional.layer_norm(query.unflatten(-1, (2, 8)), (8,)).transpose(1, 2)
    raw = heads @ heads.transpose(2, 3) * 8**-0.5
    seen = torch.ones(12, 12).tril(-1).bool()
    seen[0, 0] = True
    expected = raw.masked_fill(~seen, -torch.inf).softmax(-1)
    attention = next(module for module in model.modules() if isinstance(module, SelfAttention)).attention
    torch.testing.assert_close(attention.weights(routed, key), expected)


def test_tokens_see_their_cluster_and_local_heads_a_window() -> None:
    model = model_of("routing")
    mixer = routing_of(model)
    query, key = (torch.randn(2, 2, 12, 8, dtype=torch.float64) for _ in range(2))
    key[:, 1] = query[:, 1] = functional.layer_norm(query[:, 1], (8,))
    local, routed = mixer._formed(query, key, None, CAUSAL).gt(0).unbind(1)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    assert torch.equal(local, ((distance >= 0) & (distance < 2)).expand(2, -1, -1))
    own = (query[:, 1] @ mixer.centroids[0].T).argmax(-1)
    same = (own[:, :, None] == own[:, None]) & (distance > 0)
    alone = ~same.any(-1, keepdim=True) & (distance == 0)
    assert torch.equal(routed, same | alone)
    assert alone.any() and len(own.unique()) == 3


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_only"])
def test_sorted_by_cluster_it_is_what_it_is_with_a_mask(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts alone, of documents and with padding; with the same gradients, and the same that is told."""
    scores = {"kind": "routing", "clusters": 2, "cluster_window": 2, "window": 3}
    model = opened(build(small(architecture, scores=scores, learned_dropout={"enabled": False}, document_mask=True)))
    texts = packed(model.config)
    padding = (torch.arange(12) > 8).expand(3, -1)
    batches = [None, replace(texts, prefix_lengths=torch.tensor([5, 1, 3])), texts]
    batches.append(replace(batch_of(model.config), segment_ids=-padding.long(), padding=padding))
    for batch in batches:
        found = []
        for sorts in (False, True):
            monkeypatch.setattr(ScoresConfig, "sorts", lambda *_, sorts=sorts: sorts)
            model.zero_grad()
            keys = sample_keys(texts.seed, texts.step, texts.samples)
            hidden = model.train().hidden(texts.input_ids, keys, batch)
            kept = hidden.x if batch is None or batch.padding is None else hidden.x[:, :9]
            (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append((kept.detach(), gradients, hidden.statistics, [r.sums.clone() for r in routings(model)]))
            for routing in routings(model):
                routing.sums.zero_()
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)
    told = found[0][2]["dec_sa/00/h1" if architecture == "decoder_only" else "enc_sa/00/h1"]
    assert 0.1 < told["dropped"] < 0.9


def test_what_a_cluster_window_leaves_out_is_told() -> None:
    """Of clusters of 5, 1 and 0 tokens, and a window of 2: (1 + 2) of 10 pairs."""
    own = torch.tensor([[[0, 0, 1, 0, 0, 0, 0, 0]]])
    assert _dropped(own, 3, 2, torch.arange(8)[None] > 5).tolist() == pytest.approx([0.3])


def test_a_cache_keeps_the_cluster_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a token that is read costs no more than its own."""
    model, asked, real = model_of("routing").eval(), list[int](), Routing._likeness

    def likeness(self: Routing, x: Tensor) -> Tensor:
        asked.append(x.shape[2])
        return real(self, x)

    monkeypatch.setattr(Routing, "_likeness", likeness)
    cached(model, batch_of(model.config).input_ids, [5, 4, 1, 2])
    assert asked == [5] * 4 + [4] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("padding", [[0, 0], [0, 3]])
def test_a_prompt_that_is_sorted_is_kept_as_well(padding: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoresConfig, "sorts", lambda _, queries, keys, context: queries == keys)
    model = model_of("routing_near").eval()
    check_padded(model, batch_of(model.config, sequences=2).input_ids, [5, 4, 1, 2], padding)


def test_balanced_clusters_would_leak_and_are_for_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As published: which tokens a centroid takes depends on later ones. So the test of leaks must see it."""
    real = Routing.__init__
    assert leak(variant("routing"), "eval")[0] < 1e-12

    def balanced(self: Routing, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self._balanced = True

    monkeypatch.setattr(Routing, "__init__", balanced)
    monkeypatch.setattr(test_causality, "open_masks", opened)
    assert leak(variant("routing"), "eval")[0] > 1e-3
    monkeypatch.undo()
    encoder, decoder = (model_of("t5_routing").backbone.get_submodule(f"{name}.0") for name in ("encoder", "decoder"))
    assert routing_of(encoder)._balanced and not routing_of(decoder)._balanced  # type: ignore[arg-type]


def test_centroids_follow_the_mean_of_their_tokens_and_stay_without_any() -> None:
    model = model_of("routing").train()
    mixer = routing_of(model)
    before, key = mixer.centroids.clone(), torch.randn(2, 1, 12, 8, dtype=torch.float64)
    mixer.centroids[0, 2] = -functional.normalize(key.mean((0, 1, 2)), dim=0)  # like none of them, or hardly one
    key[...] = key.abs() * functional.normalize(mixer.centroids[0, 0] + mixer.centroids[0, 1], dim=0).sign()
    own = mixer._likeness(key).argmax(-1)
    mixer._alike(key, CAUSAL, True)
    unit = functional.normalize(key, dim=-1)
    start = mixer.centroids.clone()
    mixer._decay = 0.0
    mixer.move(mixer.sums.clone())
    for cluster in range(3):
        chosen = unit[own == cluster]
        expected = functional.normalize(chosen.mean(0), dim=0) if len(chosen) else start[0, cluster]
        torch.testing.assert_close(mixer.centroids[0, cluster], expected)
    assert not mixer.sums.any()
    assert mixer.told()["enc_sa/00/h1"]["empty"] == (own.unique().numel() < 3) / 3
    assert not torch.equal(mixer.centroids, before)


def test_recomputed_layers_count_every_token_twice_and_centroids_move_alike() -> None:
    once, twice = model_of("routing"), model_of("routing")
    checkpoint_activations(twice)
    for model in (once, twice):
        gradients(model)
    for one, two in zip(routings(once), routings(twice), strict=True):
        torch.testing.assert_close(2 * one.sums, two.sums)
        for mixer in (one, two):
            mixer.move(mixer.sums.clone())
        torch.testing.assert_close(one.centroids, two.centroids)
