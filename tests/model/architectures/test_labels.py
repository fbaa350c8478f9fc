"""Models that say labels: a padded text says what it says alone, the loss is the labels' own, and costs are counted."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import ConfigError
from model.architectures.encoder_only.labels import LabelModel, best_places
from model.batch import IGNORE, Batch
from model.costs.totals import forward_flops, num_parameters
from tests.model.helpers import VOCABULARY, build, open_masks, small

LENGTHS = (12, 5, 9)
HEADS = {"sequence": ("a", "b", "c"), "token": ("a", "b", "c"), "span": None}


def of_labels(kind: str, **changes: Any) -> Any:
    return small("encoder_only", head={"kind": kind, "labels": HEADS[kind]}, **changes)


def batch_of(kind: str, context: int = 12) -> Batch:
    """Rows of unequal lengths, each with its labels; some are none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (len(LENGTHS), context), generator=generator)
    padding = torch.arange(context) >= torch.tensor(LENGTHS)[:, None]
    labels = {
        "sequence": torch.tensor([[2], [0], [1]]),
        "token": torch.randint(0, 3, ids.shape, generator=generator).masked_fill(padding, IGNORE),
        "span": torch.tensor([[3, 7], [IGNORE, IGNORE], [0, 8]]),
    }[kind]
    samples = torch.arange(len(ids))
    return Batch(ids, labels, samples, torch.tensor(3), 9, segment_ids=-padding.long(), padding=padding)


@pytest.mark.parametrize("kind", HEADS)
def test_a_padded_text_says_what_it_says_alone(kind: str) -> None:
    """And the loss is the mean over labels, with a gradient for every parameter."""
    model = open_masks(build(of_labels(kind, bias=True))).double().eval()
    assert isinstance(model, LabelModel)
    batch = batch_of(kind)
    together = model.predict(batch.input_ids, None, batch)
    losses = []
    for row, length in enumerate(LENGTHS):
        alone = model(batch.input_ids[row : row + 1, :length])
        here = together[row : row + 1, : 1 if kind == "sequence" else length]
        torch.testing.assert_close(alone, here, rtol=0, atol=1e-12)
        labels = batch.labels[row]
        told = alone[0].T if kind == "span" else alone[0]
        wanted = labels[: len(told)]
        kept = wanted != IGNORE
        losses += functional.cross_entropy(told[kept], wanted[kept], reduction="none").tolist() if kept.any() else []
    with torch.no_grad():
        said = model(batch)
    assert said.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert said.by_token is not None
    assert said.by_token[batch.labels != IGNORE].tolist() == pytest.approx(losses, rel=1e-12)
    assert said.chosen is not None
    assert said.chosen.shape == batch.labels.shape
    model.train()(batch).loss.backward()
    asleep = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert asleep == []
    halves = [replace(batch, labels=batch.labels.roll(1, 0)), batch]
    assert model(halves[0]).loss != model(halves[1]).loss


def test_the_likeliest_answer_ends_behind_its_beginning() -> None:
    logits = torch.randn(20, 7, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(20, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[:, 3] = True
    for row, found in enumerate(best_places(logits, allowed).tolist()):
        places = allowed[row].nonzero()[:, 0].tolist()
        pairs = [(first, last) for first, last in product(places, places) if first <= last]
        assert tuple(found) == max(pairs, key=lambda pair: logits[row, pair[0], 0] + logits[row, pair[1], 1])


@pytest.mark.parametrize("kind", HEADS)
def test_what_a_head_costs(kind: str) -> None:
    config = of_labels(kind, learned_dropout={"enabled": False}, attention="explicit", positions="sinusoidal")
    model, batch = build(config), batch_of(kind)
    assert model.num_parameters() == num_parameters(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(batch.input_ids[:1], None)
    assert counter.get_total_flops() == forward_flops(config)


def test_labels_have_to_be_known() -> None:
    with pytest.raises(ConfigError, match=r"model\.head\.labels are not set"):
        build(small("encoder_only", head={"kind": "token"}))
    with pytest.raises(ConfigError, match=r"model\.head\.labels are not set"):
        num_parameters(small("encoder_only", head={"kind": "sequence"}))
