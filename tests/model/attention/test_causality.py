"""No prediction knows a later token; what a sequence meets does not depend on its batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.attention import CausalAttention
from model.config.model_config import ModelConfig
from model.layers.noise import sample_keys
from model.masks import learned_dropout
from tests.model.helpers import ARCHITECTURES, VARIANTS, VOCABULARY, batch_of, build, open_masks, small, variant

MODES = ("train", "eval")


def leak(config: ModelConfig, mode: str) -> tuple[float, float]:
    """Largest change of a logit before a changed token, and smallest largest change at that token."""
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=1)
    length = config.context
    ids = batch.input_ids.repeat(length + 1, 1)  # row t changes token t; the last one none
    for position in range(length):
        ids[position, position] = (ids[position, position] + 1) % VOCABULARY
    keys = sample_keys(batch.seed, batch.step, batch.samples).repeat(length + 1) if mode == "train" else None
    with torch.no_grad():
        logits = model.predict(ids, keys)
    change = (logits[:-1] - logits[-1]).abs().amax(dim=-1)  # [changed, seen]
    return change.tril(-1).max().item(), change.diagonal().min().item()


CAUSAL = CausalAttention.forward


def leaky(self: CausalAttention, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Every position sees a little of all."""
    return CAUSAL(self, query, key, value, *rest) + value.sum(dim=(1, 2), keepdim=True)


class LeakyAttention(CausalAttention):
    forward = leaky  # type: ignore[assignment]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_earlier_predictions_ignore_a_token(name: str, mode: str) -> None:
    before, after = leak(variant(name), mode)
    assert before < 1e-12
    assert after > (1e-5 if "two_stream" in name else 1e-3), "a query hears of a token through attention alone"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_check_catches_attention_that_sees_the_future(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalAttention, "forward", leaky)
    assert leak(variant(name), mode)[0] > 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["attention", "embed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_check_catches_a_mask_that_sees_the_future(
    architecture: Any, source: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_dropout, "CausalAttention", LeakyAttention)
    assert leak(small(architecture, learned_dropout={"source": source}), mode)[0] > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sample_alone_meets_the_same_masks_as_in_a_batch(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = batch_of(config, sequences=4)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    together = model.predict(batch.input_ids, keys)
    for row in range(4):
        alone = model.predict(batch.input_ids[row : row + 1], keys[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12)


# In training queries draw behind all tokens, of which a sample always has as many.
@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in VARIANTS for m in MODES if m == "eval" or "two_stream" not in n]
)
def test_a_shorter_sequence_meets_the_same_masks(name: str, mode: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = batch_of(config)
    keys = sample_keys(batch.seed, batch.step, batch.samples) if mode == "train" else None
    whole = model.predict(batch.input_ids, keys)
    part = model.predict(batch.input_ids[:, :7], keys)
    torch.testing.assert_close(part, whole[:, :7], rtol=0, atol=1e-12)
