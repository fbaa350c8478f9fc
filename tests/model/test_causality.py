"""No prediction knows a later token; what a sequence meets does not depend on its batch."""

import pytest
import torch
from torch import Tensor

from model import learned_dropout
from model.attention import causal_attention
from model.config import Architecture
from model.noise import sample_keys
from tests.model.helpers import ARCHITECTURES, VOCABULARY, batch_of, build, open_masks, small

MODES = ("train", "eval")


def leak(architecture: Architecture, mode: str) -> tuple[float, float]:
    """Largest change of a logit before a changed token, and smallest largest change at that token."""
    config = small(architecture)
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=2)
    keys = sample_keys(batch.seed, batch.step, batch.samples) if mode == "train" else None
    before, after = 0.0, float("inf")
    with torch.no_grad():
        reference = model.predict(batch.input_ids, keys)[0]
        for position in range(config.context):
            ids = batch.input_ids.clone()
            ids[:, position] = (ids[:, position] + 1) % VOCABULARY
            change = (model.predict(ids, keys)[0] - reference).abs()
            before = max(before, change[:, :position].max().item() if position else 0.0)
            after = min(after, change[:, position].max().item())
    return before, after


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_earlier_predictions_ignore_a_token(architecture: Architecture, mode: str) -> None:
    before, after = leak(architecture, mode)
    assert before < 1e-12
    assert after > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_check_catches_a_mask_that_sees_the_future(
    architecture: Architecture, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return causal_attention(query, key, value, heads) + value.mean(dim=1, keepdim=True)

    monkeypatch.setattr(learned_dropout, "causal_attention", leaky)
    assert leak(architecture, mode)[0] > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_alone_meets_the_same_masks_as_in_a_batch(architecture: Architecture) -> None:
    config = small(architecture)
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=4)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    together = model.predict(batch.input_ids, keys)[0]
    for row in range(4):
        alone = model.predict(batch.input_ids[row : row + 1], keys[row : row + 1])[0]
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shorter_sequence_meets_the_same_masks(architecture: Architecture) -> None:
    config = small(architecture)
    model = open_masks(build(config)).double()
    batch = batch_of(config)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    whole = model.predict(batch.input_ids, keys)[0]
    part = model.predict(batch.input_ids[:, :7], keys)[0]
    torch.testing.assert_close(part, whole[:, :7], rtol=0, atol=1e-12)
