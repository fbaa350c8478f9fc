"""Which parameter gets which learning rate."""

from typing import Any

import pytest

from model.architectures import registry
from pretrain.config.schema import load
from pretrain.engine.optim import parameter_groups, peak_rates
from tests.runs import SMALL


@pytest.mark.parametrize("source", ["attention", "low_rank", "elementwise", "embed"])
@pytest.mark.parametrize(("mask_lr", "peak"), [(1e-4, 1e-4), (1e-3, 1e-3), (1e-1, 1e-2), ("null", 1e-2)])
def test_masks_have_the_lower_of_the_two_rates(source: str, mask_lr: object, peak: float) -> None:
    config = load(
        [*SMALL, "model.vocab_size=32", f"model.learned_dropout.source={source}", f"optimizer.mask_lr={mask_lr}"]
    )
    model = registry.build(config.model)
    rates = peak_rates(model, config.optimizer)
    masks = {name for name in rates if "dropout" in name or "mask_source" in name}
    assert masks and {rates[name] for name in masks} == {peak}
    assert {rates[name] for name in rates.keys() - masks} == {1e-2}
    groups = parameter_groups(model, config.optimizer)
    of_both_kinds = 4 - (source == "elementwise")  # which has vectors only
    assert len(groups) == (of_both_kinds if peak < 1e-2 else 2)
    assert sorted(p.numel() for g in groups for p in g["params"]) == sorted(p.numel() for p in model.parameters())
    assert {group.get("peak", 1e-2) for group in groups} == {peak, 1e-2}


@pytest.mark.parametrize(("attention_lr", "peak"), [("null", 1e-1), (3e-2, 3e-2)])
def test_what_shapes_the_weights_of_attention_moves_faster(attention_lr: Any, peak: float) -> None:
    args = [*SMALL, "model.vocab_size=32", "model.weights.kind=entmax", f"optimizer.attention_lr={attention_lr}"]
    config = load(args)
    model = registry.build(config.model)
    rates = peak_rates(model, config.optimizer)
    assert {rate for name, rate in rates.items() if "alpha" in name} == {peak}
    assert {rate for name, rate in rates.items() if "alpha" not in name} == {1e-2}
    [own] = [group for group in parameter_groups(model, config.optimizer) if group.get("peak") == peak]
    assert own["weight_decay"] == 0.0
    muon = config.optimizer.model_copy(update={"kind": "muon", "attention_lr": None})
    assert set(peak_rates(model, muon).values()) == {1e-2}
