"""Options of attention with the options and architectures that no other test has them meet (docs/attention.md).

Of each pair: every parameter learns, and alike when layers are recomputed; nothing leaks; a cache changes nothing.
"""

from typing import Any

import pytest
import torch

from model.attention.routing import routings
from model.costs.totals import num_parameters
from pretrain.engine.layer_transforms import checkpoint_activations
from tests.model.attention import test_causality
from tests.model.attention.test_causality import leak
from tests.model.attention.test_mixers import check_padded, gradients, opened
from tests.model.helpers import batch_of, build, small

OFF: dict[str, Any] = {"learned_dropout": {"enabled": False}}
ALONE = {"architecture": "decoder_only"}
BERT = {"architecture": "encoder_only"}
XLNET = {"architecture": "two_stream"}
DRAFT = {"architecture": "draft_and_verify", "cross_heads": 2}
TWICE = {"recurrence": {"steps": 2}}
HALTING = {"recurrence": {"steps": 2, "halt": True, "halt_bias": 0}}
L0 = {"l0": {"enabled": True}}
GATES = {"block_gates": {"kind": "top", "blocks": 4, "density": 0.5}}
ENTMAX: dict[str, Any] = {"weights": {"kind": "entmax"}}
SPAN: dict[str, Any] = {"weights": {"kind": "adaptive_span", "ramp": 3, "span_init": 0.3}}
MIXTURE: dict[str, Any] = {"scores": {"kind": "synthesizer", "parts": ["dense", "random"]}}
LINFORMER: dict[str, Any] = {"scores": {"kind": "linformer", "slots": 4}}
LINFORMER_KV: dict[str, Any] = {"scores": LINFORMER["scores"] | {"sharing": "key_value"}}
ROUTING: dict[str, Any] = {"scores": {"kind": "routing", "clusters": 3, "window": 2}}
BALANCED: dict[str, Any] = {"scores": {"kind": "routing", "clusters": 2, "assign": "balanced"}}
WINDOW: dict[str, Any] = {"pattern": {"kind": "window", "window": 3, "sinks": 1}}
STRIDED: dict[str, Any] = {"pattern": {"kind": "strided", "stride": 3, "merge": "heads"}}

CAUSAL: dict[str, dict[str, Any]] = {
    "universal, entmax": {**OFF, **TWICE, **ENTMAX},
    "universal, span and L0": {**ALONE, **OFF, **TWICE, **SPAN, **L0},
    "universal, synthesizer": {**ALONE, **TWICE, **MIXTURE},
    "universal, routing": {**ALONE, **OFF, **TWICE, **ROUTING},
    "universal, window and L0": {**OFF, **TWICE, **WINDOW, **L0},
    "halting, entmax and window": {**ALONE, **OFF, **HALTING, **ENTMAX, **WINDOW},
    "halting, span": {**OFF, **HALTING, **SPAN},
    "halting, synthesizer and strides": {**ALONE, **OFF, **HALTING, **MIXTURE, **STRIDED},
    "halting, routing and window": {**ALONE, **OFF, **HALTING, **ROUTING, **WINDOW},
    "gates, span and strides": {**ALONE, **OFF, **GATES, **SPAN, **STRIDED},
    "L0, entmax": {**ALONE, **OFF, **L0, **ENTMAX},
    "L0, synthesizer": {**ALONE, **OFF, **L0, **MIXTURE},
    "L0, routing": {**ALONE, **OFF, **L0, **ROUTING},
}
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "gates, linformer": {**BERT, **OFF, **GATES, **LINFORMER},
    "L0, linformer, universal": {**BERT, **OFF, **L0, **TWICE, **LINFORMER_KV},
    "L0, balanced": {**BERT, **OFF, **L0, **BALANCED},
    "halting, balanced": {**BERT, **OFF, **HALTING, **BALANCED},
    "two-stream, entmax and L0": {**XLNET, **OFF, **L0, **ENTMAX},
    "draft, entmax and L0": {**DRAFT, **OFF, **L0, **ENTMAX},
    "draft, synthesizer": {**DRAFT, **MIXTURE, "draft": {"share": True}},
    "draft, linformer": {**DRAFT, **OFF, **LINFORMER},
    "draft, routing": {**DRAFT, **OFF, **ROUTING, "draft": {"masking": "glat"}},
    "draft, balanced": {**DRAFT, **OFF, **BALANCED, "draft": {"refine": True, "masking": "nat"}},
}


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])
def test_every_parameter_learns_alike_when_layers_are_recomputed(name: str) -> None:
    options = {"layers": 1} | (CAUSAL | BOTH_WAYS)[name]
    plain, recomputed = (opened(build(small(**options))) for _ in range(2))
    assert plain.num_parameters() == num_parameters(plain.config)
    expected = gradients(plain)
    assert set(expected) == {"loss", *(n for n, _ in plain.named_parameters())}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected.values())
    checkpoint_activations(recomputed)
    torch.testing.assert_close(gradients(recomputed), expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_leaks_and_a_cache_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_causality, "open_masks", opened)
    config = small(**{"layers": 1} | CAUSAL[name])
    for mode in ("train", "eval"):
        before, after = leak(config, mode)
        assert before < 1e-12
        assert after > 1e-4
    model = opened(build(config)).eval()
    ids = batch_of(config, sequences=2).input_ids
    for chunks in ([1] * 12, [5, 4, 1, 2]):
        check_padded(model, ids, chunks, [0, 3])


def test_the_first_look_at_a_draft_counts_in_no_cluster() -> None:
    """`glat` drafts twice in a step; each token is counted once."""
    model = opened(build(small(**{"layers": 1} | BOTH_WAYS["draft, routing"]))).train()
    batch = batch_of(model.config)
    assert batch.decoder_input_ids is not None
    model(batch)
    counted = [routing.sums[..., -1].sum().item() for routing in routings(model)]
    assert counted == [batch.input_ids.numel(), *[batch.decoder_input_ids.numel()] * 2]
