"""What a model can be told, what it refuses, and the presets."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from model import registry
from model.bistability import peak, warnings_for
from model.config import EntropyConfig, L1Config, LearnedDropoutConfig, ModelConfig

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_build(path: Path) -> None:
    config = ModelConfig.model_validate(yaml.safe_load(path.read_text())["model"] | {"vocab_size": 65})
    with torch.device("meta"):
        model = registry.build(config)
    comment = path.read_text().splitlines()[0]
    if "Tinyshakespeare" in comment:
        assert f"{model.num_parameters():,}" in comment
    assert warnings_for(config.learned_dropout) == []


def test_a_vocabulary_is_needed_to_build() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        registry.build(ModelConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 130}, "heads=4 does not divide width=130"),
        ({"width": 132}, "cross_heads=8 does not divide width=132"),
        (
            {"architecture": "decoder_only", "learned_dropout": {"sites": ["enc_ff"]}},
            "decoder_only has no site enc_ff; it has dec_ff",
        ),
        ({"architecture": "decoder_only", "cross_heads": 4}, "cross_heads: decoder_only has no second stream"),
        ({"learned_dropout": {"sites": []}}, "at least 1 item"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_refusals_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values)


def test_sites_default_to_all_that_the_architecture_has() -> None:
    assert ModelConfig().dropout_sites == ("enc_ff", "dec_ff")
    assert ModelConfig(architecture="decoder_only", width=156, heads=12).dropout_sites == ("dec_ff",)
    assert ModelConfig(learned_dropout=LearnedDropoutConfig(enabled=False)).dropout_sites == ()


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
    code = "import sys; import model.config, model.bistability; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
