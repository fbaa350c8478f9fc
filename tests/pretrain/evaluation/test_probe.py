"""Flips of the masks between two validations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from model.config.mask_config import LearnedDropoutConfig
from model.config.model_config import ModelConfig
from model.layers.layers import FeedForward
from model.masks.learned_dropout import LearnedDropout
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.probe import Probe
from tests.model.helpers import configured
from tests.objectives import objective

CAUSAL = Batches(torch.device("cpu"), objective())


def config(dataset: Path, *, enabled: bool) -> ModelConfig:
    vocabulary = Dataset.open(dataset).tokenizer().vocab_size
    dropout = LearnedDropoutConfig(enabled=enabled, shift_init=1.2)
    return configured(layers=2, width=16, heads=2, context=16, vocab_size=vocabulary, learned_dropout=dropout)


def test_exactly_the_masks_that_moved_have_flips(dataset: Path) -> None:
    torch.manual_seed(0)
    model = registry.build(config(dataset, enabled=True))
    probe = Probe(Windows.of(Dataset.open(dataset), "validation", 16, partial=True), CAUSAL, compiled=False)
    assert probe.flips(model) == {}, "nothing to compare with"
    assert set(probe.flips(model).values()) == {0.0}, "nothing has moved"
    [last] = [m for m in model.modules() if isinstance(m, LearnedDropout) and m.name == "dec_ff/01"]
    with torch.no_grad():
        last.shift[:4] = torch.pi  # a quarter of the channels goes from m near 0.7 to m near 0
    assert probe.flips(model) == pytest.approx(
        {
            "gate/flips": 0.25 / 4,
            "gate/flips/enc_ff/00": 0.0,
            "gate/flips/enc_ff/01": 0.0,
            "gate/flips/dec_ff/00": 0.0,
            "gate/flips/dec_ff/01": 0.25,
        }
    )
    assert all(module.sides is None for module in model.modules() if isinstance(module, LearnedDropout))


def test_padding_has_no_flips(dataset: Path) -> None:
    """The share is that of the tokens, however long the windows are that hold them."""
    windows = Windows.of(Dataset.open(dataset), "validation", 16)
    rows = windows.read(np.arange(8))
    found = []
    for behind in (1, 7):  # the last column is a label alone
        torch.manual_seed(0)
        model = registry.build(config(dataset, enabled=True))
        shown = np.concatenate([rows[:, :9], np.full((8, behind), -1)], axis=1)
        windows.read = lambda indices, shown=shown: shown[indices % 8]  # type: ignore[method-assign,misc]
        for module in model.modules():
            if isinstance(module, FeedForward):  # what is masked is small at the start, and its angles are
                torch.nn.init.normal_(module.down.weight, std=1.0)
        probe = Probe(windows, CAUSAL, compiled=False)
        probe.flips(model)
        for module in model.modules():
            if isinstance(module, LearnedDropout):
                torch.nn.init.normal_(module.qkv.weight, std=0.5)
        found.append(probe.flips(model))
    assert found[0] == found[1]
    assert 0.01 < found[0]["gate/flips"] < 0.99


def test_a_model_without_masks_has_none(dataset: Path) -> None:
    model = registry.build(config(dataset, enabled=False))
    probe = Probe(Windows.of(Dataset.open(dataset), "validation", 16, partial=True), CAUSAL, compiled=False)
    assert probe.flips(model) == probe.flips(model) == {}
