"""Small models and batches."""

from typing import Any

import torch

from model import registry
from model.config import Architecture, LearnedDropoutConfig, ModelConfig
from model.interface import Batch
from model.language_model import LanguageModel

torch.set_num_threads(1)

VOCABULARY = 17
ARCHITECTURES: tuple[Architecture, ...] = ("parallel_encoder_decoder", "decoder_only")


def small(architecture: Architecture = "parallel_encoder_decoder", **changes: Any) -> ModelConfig:
    """Two layers, C 16, N 12; learned dropout on."""
    shape = {"layers": 2, "width": 16, "heads": 2, "context": 12, "vocab_size": VOCABULARY}
    return ModelConfig(architecture=architecture, **(shape | changes))


def build(config: ModelConfig, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return registry.build(config)


def batch_of(config: ModelConfig, sequences: int = 3, step: int = 5, first_sample: int = 100, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sequences, config.context + 1), generator=generator)
    samples = torch.arange(first_sample, first_sample + sequences)
    return Batch(ids[:, :-1], ids[:, 1:], samples, torch.tensor(step), seed=9)


def open_masks(model: LanguageModel, shift: float = 1.57, std: float = 0.5) -> LanguageModel:
    """Give the masks values all over [0, 1], as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "dropout.shift" in name:
            torch.nn.init.constant_(parameter, shift)
        if "dropout.qkv" in name:
            torch.nn.init.normal_(parameter, std=10 * std, generator=generator)
    return model


def without_dropout() -> LearnedDropoutConfig:
    return LearnedDropoutConfig(enabled=False)
