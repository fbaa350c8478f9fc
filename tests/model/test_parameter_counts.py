"""Parameter counts to the digit: our presets, and the published models (docs/model.md C)."""

from typing import Any

import pytest
import torch

from model import registry
from model.config import Architecture, LearnedDropoutConfig, ModelConfig


def count(architecture: Architecture, *, dropout: bool = False, **shape: Any) -> int:
    config = ModelConfig(architecture=architecture, learned_dropout=LearnedDropoutConfig(enabled=dropout), **shape)
    with torch.device("meta"):
        return registry.build(config).num_parameters()


@pytest.mark.parametrize(
    ("architecture", "layers", "expected"),
    [
        ("parallel_encoder_decoder", 2, 952_064),
        ("parallel_encoder_decoder", 3, 1_411_584),
        ("decoder_only", 4, 804_096),
    ],
)
def test_tinyshakespeare_size(architecture: Architecture, layers: int, expected: int) -> None:
    shape: dict[str, Any] = {"layers": layers, "width": 128, "heads": 4, "context": 64, "vocab_size": 65}
    assert count(architecture, **shape) == expected
    sites = layers * (2 if architecture == "parallel_encoder_decoder" else 1)
    assert count(architecture, dropout=True, **shape) == expected + sites * (3 * 128**2 + 128)


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads", "dropout", "expected"),
    [
        ("parallel_encoder_decoder", 5, 200, 5, False, 15_697_600),
        ("decoder_only", 10, 210, 10, False, 15_850_380),
        ("decoder_only", 26, 160, 10, False, 16_036_800),
        ("decoder_only", 26, 156, 12, False, 15_441_192),
        ("decoder_only", 26, 144, 9, True, 15_335_424),
    ],
)
def test_published_size(
    architecture: Architecture, layers: int, width: int, heads: int, dropout: bool, expected: int
) -> None:
    shape = {"layers": layers, "width": width, "heads": heads, "context": 200, "vocab_size": 50_257}
    assert count(architecture, dropout=dropout, **shape) - 200 * width == expected


def test_biases_are_counted() -> None:
    width = 32
    shape: dict[str, Any] = {"layers": 2, "width": width, "heads": 4, "context": 8, "vocab_size": 10}
    per_layer = (3 + 1 + 4 + 1 + 2) * width  # qkv, out, up, down, two norms
    assert count("decoder_only", bias=True, **shape) == count("decoder_only", **shape) + 2 * per_layer + width
