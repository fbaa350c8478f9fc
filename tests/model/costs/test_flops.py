"""The formula against what torch counts while the real model runs."""

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config.mask_config import LearnedDropoutConfig
from model.config.model_config import ModelConfig
from model.costs.flops import (
    executed_flops_per_token,
    forward_flops_per_token,
    training_flops_per_token,
    utilisation_per_token,
)
from model.costs.totals import executed_flops, forward_flops, sample_flops_by_part
from model.gpus import peak_flops
from model.masks import block_gates
from tests.model.helpers import ARCHITECTURES, EVERY, MIXED, MIXED_BOTH_WAYS, batch_of, build, configured, variant

SHAPES: list[dict[str, Any]] = [
    {"layers": 3, "width": 64, "heads": 4, "context": 32, "vocab_size": 100},
    {"layers": 1, "width": 24, "heads": 3, "context": 7, "vocab_size": 31, "bias": True},
    {"layers": 2, "width": 32, "heads": 2, "context": 48, "vocab_size": 257},
]


def counted(config: ModelConfig, sequences: int, backward: bool) -> int:
    """In training, where every option is at work and without rounding the masks are in the graph."""
    model = build(config)
    batch = batch_of(config, sequences)
    # The unfused attention: the fused one's backward pass also computes its forward pass again.
    # Where gradients are wanted, the loss computes some of them in its forward pass.
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        output = model(batch)
        if backward:
            output.loss.backward()
    return counter.get_total_flops()


def dropout(sites: int, architecture: str) -> LearnedDropoutConfig:
    chosen: Any = ["enc_ff", "dec_ff"][-sites:] if architecture == "parallel_encoder_decoder" else ["dec_ff"]
    return LearnedDropoutConfig(enabled=sites > 0, sites=chosen if sites else None)


@pytest.mark.parametrize(("architecture", "sites"), [(a, n) for a in ARCHITECTURES for n in (0, 1, 2)][:-1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_what_torch_counts(architecture: str, shape: dict[str, Any], sites: int) -> None:
    config = configured(architecture=architecture, learned_dropout=dropout(sites, architecture), **shape)
    tokens = 2 * config.context
    assert counted(config, 2, backward=False) == forward_flops_per_token(config) * tokens
    assert counted(config, 2, backward=True) == training_flops_per_token(config) * tokens


@pytest.mark.parametrize("name", [*EVERY, *MIXED, *MIXED_BOTH_WAYS])
def test_the_formula_knows_every_option(name: str) -> None:
    changes: dict[str, Any] = {"attention": "auto"} if EVERY.get(name, {}).get("attention") == "flash" else {}
    config = variant(name, layers=3, pattern={}, **changes)  # dense here, so that torch counts every key
    tokens = 2 * config.context
    forward = 2 * forward_flops(config)
    if "factorised_random" in config.scores.parts:  # its table is made once for both sequences
        forward -= config.layers * 2 * config.heads * config.context**2 * config.scores.rank
    assert counted(config, 2, backward=False) == forward
    assert 2 * forward_flops(config) == pytest.approx(forward_flops_per_token(config) * tokens)
    training = round(training_flops_per_token(config) * tokens) - 3 * (2 * forward_flops(config) - forward)
    if config.learned_dropout.detach_embed:  # no gradient with respect to the one input of its first map
        training -= 2 * 3 * config.width**2 * tokens
    assert counted(config, 2, backward=True) == training


MODULES = {
    "token table": "token_embed",
    "attention": r"backbone\.(encoder|decoder|layers|draft_decoder)\.\d+\.attention",
    "cross attention": r"backbone\.(decoder|draft_decoder)\.\d+\.cross_attention",
    "feed forward": r"backbone\.(encoder|decoder|layers|draft_decoder)\.\d+\.ff",
    "decoder input": r"backbone\.decoder_input",
    "masks": r"(backbone\.\w+\.\d+\.)?\w+_dropout",
    "mask source": "mask_source",
    "halting": r"backbone\.recurrence\.halting",
    "lengths": r"backbone\.length",
}
"""Where each part is computed."""


@pytest.mark.parametrize("name", EVERY)
def test_each_part_is_what_torch_counts_in_its_modules(name: str) -> None:
    config = variant(name, layers=3, attention="explicit")
    model = build(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch_of(config, sequences=1))
    counted = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = sample_flops_by_part(config)
    for part, flops in parts.items():
        stream, _, kind = part.rpartition(": ")
        modules = [
            n for n in counted if re.fullmatch(MODULES[kind], n) and n.removeprefix("backbone.").startswith(stream)
        ]
        assert sum(counted[n] for n in modules) == flops, part
    assert sum(parts.values()) == forward_flops(config)


@pytest.mark.parametrize("name", ["gates", "bert_gates"])
def test_what_is_executed_is_what_torch_counts_where_closed_blocks_are_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_gates, "pays", lambda *sizes, **options: True)
    config = variant(name)
    assert counted(config, 2, backward=False) == 2 * executed_flops(config) < 2 * forward_flops(config)
    executed = executed_flops_per_token(config, training=True) * 2 * config.context
    assert counted(config, 2, backward=True) == executed == pytest.approx(6 * executed_flops(config))


@pytest.mark.parametrize(("sites", "expected"), [(0, 25_051_136), (2, 31_342_592)])
def test_known_values(sites: int, expected: int) -> None:
    config = configured(learned_dropout=dropout(sites, "parallel_encoder_decoder"), **SHAPES[0])
    assert forward_flops_per_token(config) * config.context == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("x86_64", None),
    ],
)
def test_an_unknown_device_has_no_peak(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_utilisation() -> None:
    """10^6 tokens a second of this model on 8 H100 are 0.0297 % of their peak."""
    config = configured(learned_dropout=dropout(0, "parallel_encoder_decoder"), **SHAPES[0])
    share = utilisation_per_token(config, "NVIDIA H100 80GB HBM3", 8)
    assert share == pytest.approx(3 * 25_051_136 / 32 / (8 * 989e12))
    assert share is not None
    assert share * 1e6 == pytest.approx(2.968e-4, rel=1e-3)
    assert utilisation_per_token(config, "", 1) is None


def test_a_pattern_counts_the_keys_that_it_lets_be_seen() -> None:
    """Of each layer, and of its masks; the last query sees most."""
    shape: dict[str, Any] = {"architecture": "decoder_only", "layers": 3, "width": 32, "context": 64, "vocab_size": 50}
    full = configured(**shape)
    window = configured(**shape, pattern={"kind": "window", "window": 8, "sinks": 2, "full_every": 3})
    saved = 64 * 4 * 32 * (64 - 10)
    assert forward_flops(full) - forward_flops(window) == 2 * 2 * saved
    strided = configured(**shape, pattern={"kind": "strided", "stride": 8, "merge": "alternate"})
    assert forward_flops(full) - forward_flops(strided) == 2 * 3 * 64 * 4 * 32 * (64 - 8)
    halves = configured(**shape, pattern={"kind": "fixed", "stride": 8, "summary": 2, "merge": "heads"})
    assert forward_flops(full) - forward_flops(halves) == 2 * 3 * 64 * 4 * 32 * (64 - (8 + 16) // 2)
