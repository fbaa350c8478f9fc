"""The count by arithmetic is the model's own."""

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.architectures import registry
from model.config.model_config import ModelConfig
from model.costs.totals import num_parameters
from pretrain.config.layers import presets
from pretrain.config.schema import load
from tests.model.helpers import EVERY, configured, variant


def counted(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in registry.build(config).parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_every_variant(name: str, bias: bool) -> None:
    config = variant(name, layers=3, bias=bias)
    assert num_parameters(config) == counted(config)


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith("model/")])
def test_every_preset(preset: str) -> None:
    objectives = {"encoder_only": "masked", "encoder_decoder": "span_corruption", "draft_and_verify": "continuation"}
    objectives["two_stream"] = "permutation"
    for objective in ("causal", *objectives.values()):
        try:
            config = load([preset, "model.vocab_size=512", f"data.objective={objective}"]).model
        except ConfigError:
            continue
        assert num_parameters(config) == counted(config)
        return
    pytest.fail(f"{preset} fits no objective")


def test_without_a_vocabulary_there_is_nothing_to_count() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        num_parameters(configured())
