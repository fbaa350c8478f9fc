"""What a model can be told, what it refuses, and the presets."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.errors import ConfigError
from model.architectures import registry
from model.architectures.registry import configure
from model.config.mask_config import EntropyConfig, L1Config, LearnedDropoutConfig
from model.masks.bistability import peak, warnings_for
from tests.model.helpers import EVERY, NAMED, configured, options, variant

PRESETS = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.yaml"))


_DRAFT = {"architecture": "draft_and_verify"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_build(path: Path) -> None:
    config = configured(**yaml.safe_load(path.read_text())["model"] | {"vocab_size": 65})
    with torch.device("meta"):
        model = registry.build(config)
    comment = path.read_text().splitlines()[0]
    if "Tinyshakespeare" in comment:
        assert f"{model.num_parameters():,}" in comment
    warnings = warnings_for(config.learned_dropout)
    if path.stem == "learned-dropout-seed":  # the proposal's penalties do nothing but hold masks open
        assert "stays inert" in warnings[0]
    else:
        assert warnings == []


def test_a_vocabulary_is_needed_to_build() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        registry.build(configured())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 130}, "heads=4 does not divide width=130"),
        ({"width": 132}, "cross_heads=8 does not divide width=132"),
        (
            {"architecture": "decoder_only", "learned_dropout": {"sites": ["enc_ff"]}},
            "learned_dropout.sites: decoder_only has no site enc_ff; it has dec_ff, dec_sa, embed",
        ),
        ({"architecture": "decoder_only", "cross_heads": 4}, "cross_heads: decoder_only has no second stream"),
        ({"architecture": "decoder_only", "topology": "serial"}, "topology: decoder_only has no second stream"),
        ({"architecture": "decoder_only", "encoder_loss": {"kind": "mse"}}, "encoder_loss: decoder_only has no second"),
        ({"learned_dropout": {"sites": []}}, "at least 1 item"),
        ({"learned_dropout": {"sites": ["cross", "cross"]}}, "learned_dropout.sites: a site is named twice"),
        ({"learned_dropout": {"detach_embed": True}}, "detach_embed is about source=embed"),
        ({"weights": {"kind": "entmax"}, "attention": "flash"}, "attention=flash: no kernel has weights.kind=entmax"),
        ({"weights": {"kind": "entmax", "ramp": 5}}, "weights.ramp is for weights.kind=adaptive_span, not entmax"),
        ({"pattern": {"kind": "window", "windows": [3, 4]}}, "pattern.windows has 2 widths, and there are layers=3"),
        ({"pattern": {"kind": "window", "windows": [3], "window": 3}}, "leave window and full_every out"),
        (
            {"scores": {"kind": "linformer"}},
            "scores.kind=linformer sums keys over all positions before a mask could act",
        ),
        (
            {"scores": {"kind": "linformer"}, "architecture": "encoder_only", "document_mask": True},
            "before a mask could act: leave document_mask out",
        ),
        ({"scores": {"kind": "synthesizer"}, "kv_heads": 2}, "has no keys that kv_heads could share"),
        ({"scores": {"kind": "synthesizer"}, "positions": "rotary"}, "positions=rotary turns queries and keys"),
        ({"scores": {"kind": "synthesizer"}, "weights": {"kind": "entmax"}}, "is for scores of queries and keys"),
        ({"scores": {"kind": "synthesizer"}, "attention": "flash"}, "no kernel has scores.kind=synthesizer"),
        ({"scores": {"slots": 5}}, "scores.slots is for scores.kind=linformer, not dot"),
        ({"scores": {"sharing": "none"}}, "scores.sharing is for scores.kind=linformer, not dot"),
        ({"scores": {"kind": "synthesizer", "rank": 5}}, "scores.rank is about the part factorised_random"),
        (
            {"scores": {"kind": "routing", "assign": "balanced"}},
            r"which tokens a centroid takes .* \(measured: logits before a changed token move by up to 0.47\)",
        ),
        ({"scores": {"kind": "routing"}, "positions": "rotary"}, "alike wherever they stand; take learned"),
        ({"scores": {"kind": "routing", "routed_heads": 9}}, "scores.routed_heads=9, and there are heads=4"),
        (
            {"scores": {"kind": "routing", "cluster_window": 5}, "pattern": {"kind": "window", "window": 9}},
            "cluster_window counts the tokens of a cluster that a pattern hides: leave pattern.kind=window out",
        ),
        (
            {
                "scores": {"kind": "routing", "cluster_window": 5, "assign": "balanced"},
                "architecture": "encoder_only",
            },
            "which assign=balanced has of one size: leave it out",
        ),
        ({"scores": {"clusters": 5}}, "scores.clusters is for scores.kind=routing, not dot"),
        ({"weights": {"alpha": 1.5}}, "weights.alpha is for weights.kind=entmax, not softmax"),
        ({"l0": {"enabled": True}}, "l0 and learned_dropout are both enabled"),
        ({"l0": {"sites": ["cross"]}, "architecture": "decoder_only"}, "l0.sites: decoder_only has no site cross"),
        ({"norm": "batchnorm"}, "would see the tokens it is to predict; it fits bidirectional encoders only"),
        ({"dropout": 0.1, "attention": "flash"}, "never forms the attention weights.* attention_dropout=0"),
        ({"positions": "rotary", "add_next_position": True}, "need position vectors, which positions=rotary has not"),
        ({"positions": "rotary", "width": 20}, "20 over heads=4 is 5 channels a head; take an even number"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"kv_heads": 1, "cross_heads": 2}, "shares keys among 4 heads, which do not divide cross_heads=2"),
        ({"cross_source": "layer_input", "topology": "serial"}, "with topology=serial every layer reads the whole"),
        ({"cross_source": "layer_input", "layers": 1}, "needs layers >= 2"),
        ({"norm": "batchnorm", "architecture": "decoder_only"}, "would see the tokens it is to predict"),
        (
            {"norm": "batchnorm", "architecture": "encoder_only", "document_mask": True},
            "all documents of a micro-batch, and with document_mask none may know of another",
        ),
        ({"architecture": "encoder_only", "cross_heads": 4}, "cross_heads: encoder_only has no second stream"),
        (
            {"architecture": "encoder_decoder", "topology": "serial"},
            "topology: .* reads one sequence and writes another",
        ),
        ({"architecture": "encoder_decoder", "document_mask": True}, "document_mask: .* reads one sequence and writes"),
        ({**_DRAFT, "draft": {"refine": True}}, "draft.masking=mixed shows parts of that target .* draft.masking=nat"),
        ({**_DRAFT, "draft": {"share": True, "layers": 1}}, "one stack for both decoders.* leave draft.layers out"),
        (
            {**_DRAFT, "draft": {"share": True}, "block_gates": {"kind": "top"}, "learned_dropout": {"enabled": False}},
            "runs each layer .* twice in a step",
        ),
        (
            {**_DRAFT, "draft": {"share": True}, "learned_dropout": {"sites": ["draft_ff"]}},
            "no stack of its own for drafts, and so no site draft_ff; name dec_ff",
        ),
        ({**_DRAFT, "draft": {"chunk": 256}}, "draft.chunk=256 leaves nothing of a window .* take 128 or less"),
        ({**_DRAFT, "document_mask": True}, "document_mask: draft_and_verify reads one sequence and writes another"),
        ({"draft": {"share": True}}, "draft: parallel_encoder_decoder"),
        ({"architecture": "encoder_decoder", "context": 9}, "context=9: of so few tokens .* makes 10; take 10 or more"),
        (
            {"architecture": "encoder_only", "l0": {"sites": ["dec_ff"]}},
            "encoder_only has no site dec_ff; it has enc_ff",
        ),
        ({"recurrence": {"halt": True}}, "recurrence.halt chooses among steps, and recurrence.steps=1"),
        ({"recurrence": {"steps": 2, "epsilon": 0.1}}, "recurrence.epsilon is about halt=true"),
        ({"recurrence": {"steps": 2}, "architecture": "encoder_decoder"}, "encoder_decoder are applied once"),
        ({"recurrence": {"steps": 2}, "topology": "serial"}, "topology=serial has the encoder done first"),
        (
            {"recurrence": {"steps": 2}, "cross_source": "layer_input"},
            "cross_source=layer_input has the last encoder layer left out",
        ),
        (
            {"recurrence": {"steps": 2}, "architecture": "encoder_only", "norm": "batchnorm"},
            "recurrence.steps=2 would mix those of its steps",
        ),
        ({"recurrence": {"steps": 2}, "learned_dropout": {"eval_rounding": "sample"}}, "would draw the same"),
        ({"recurrence": {"steps": 2, "halt": True}}, "recurrence.halt with learned_dropout: a token that has halted"),
        (
            {"recurrence": {"steps": 2, "halt": True}, "learned_dropout": {"enabled": False}, "l0": {"enabled": True}},
            "recurrence.halt with l0",
        ),
        (
            {
                "recurrence": {"steps": 2, "halt": True},
                "learned_dropout": {"enabled": False},
                "block_gates": {"kind": "top"},
            },
            "recurrence.halt with block_gates",
        ),
        ({"dropout": 1.0}, "less than 1"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_refusals_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(values)


@pytest.mark.parametrize(
    ("architecture", "objective", "message"),
    [
        ("decoder_only", "causal", None),
        ("parallel_encoder_decoder", "prefix", None),
        ("encoder_only", "masked", None),
        ("encoder_decoder", "span_corruption", None),
        ("draft_and_verify", "continuation", None),
        ("draft_and_verify", "causal", "reads one text and writes another; take data.objective=pairs or continuation"),
        ("decoder_only", "masked", "predicts each token from those before it; take data.objective=causal or prefix"),
        ("encoder_only", "causal", "sees every token, the next one included, .* take data.objective=masked"),
        ("encoder_decoder", "causal", "reads one text and writes another.* take data.objective=span_corruption"),
    ],
)
def test_an_objective_has_to_fit(architecture: Any, objective: Any, message: str | None) -> None:
    config = configured(architecture=architecture)
    if message is None:
        config.check_objective(objective)
    else:
        with pytest.raises(ValueError, match=f"data.objective={objective} does not fit .*{architecture}.*{message}"):
            config.check_objective(objective)


def test_flash_attention_goes_with_dropout_elsewhere() -> None:
    assert configured(attention="flash", dropout=0.1, attention_dropout=0.0).attention_rate == 0.0


def test_the_variants_that_were_joined_have_lost_no_option() -> None:
    few, all_of_them = ({(key, str(value)) for v in some.values() for key, value in options(v).items()}
                        for some in (EVERY, NAMED))  # fmt: skip
    assert few == all_of_them
    assert len(EVERY) < 0.7 * len(NAMED)
    assert {alone for name in EVERY for alone in name.split("+")} == NAMED.keys()


@pytest.mark.parametrize("name", EVERY)
def test_a_dumped_configuration_is_the_same_one(name: str) -> None:
    config = variant(name)
    assert configure(config.model_dump(mode="json")) == config


def test_sites_default_to_all_that_the_architecture_has() -> None:
    assert configured().dropout_sites == ("enc_ff", "dec_ff")
    assert configured(architecture="decoder_only", width=156, heads=12).dropout_sites == ("dec_ff",)
    assert configured(learned_dropout=LearnedDropoutConfig(enabled=False)).dropout_sites == ()


@pytest.mark.parametrize(("a", "h"), [(0.1, 0.1), (0.01, 0.02), (0.014, 0.01)])
def test_peak_of_linear_l1_and_shannon_entropy(a: float, h: float) -> None:
    config = LearnedDropoutConfig(l1=L1Config(weight=a), entropy=EntropyConfig(weight=h))
    assert peak(config) == pytest.approx(math.exp(a * math.log(2) / h - 1), abs=2e-3)


def test_peak_of_binary_entropy() -> None:
    config = LearnedDropoutConfig(l1=L1Config(weight=0.1), entropy=EntropyConfig(kind="binary", weight=0.1))
    assert peak(config) == pytest.approx(2 / 3, abs=2e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entropy": {"weight": 0.01, "start_step": 0, "ramp_steps": 0}}, "m_peak = 0.74 open from step 0"),
        ({"l1": {"weight": 0.05}}, "every mask drifts to 0 from its start at m = 0.94"),
        ({"entropy": {"start_step": 100, "ramp_steps": 0}}, "L1 has 100 steps .* 0.40 rad .* 1.03 are needed"),
        ({"l1": {"weight": 0.0}}, "L1 has 0 steps"),
        ({"source": "elementwise"}, "L1 has 2000 steps .* 0.50 rad .* 1.03 are needed"),
        ({"source": "embed"}, None),
        ({}, None),
        ({"shift_init": 1.6, "entropy": {"start_step": 0, "ramp_steps": 0}}, None),
        ({"entropy": {"weight": 0.0, "start_step": 0}}, None),
        ({"enabled": False, "l1": {"weight": 0.05}}, None),
    ],
)
def test_warnings_of_bistable_penalties(values: dict[str, Any], message: str | None) -> None:
    found = warnings_for(LearnedDropoutConfig.model_validate(values))
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(found[0])


def test_configuration_is_free_of_torch() -> None:
    modules = "model.architectures.registry, model.costs.totals, model.masks.bistability"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
