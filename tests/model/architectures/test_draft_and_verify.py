"""A draft and what verifies it: what is hidden, what each decoder may know, and what is learned."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.draft_and_verify.masking import glanced, hidden_places
from model.architectures.draft_and_verify.two_decoders import TwoDecoders
from model.batch import IGNORE, Batch
from model.layers.noise import sample_keys
from tests.model.helpers import VOCABULARY, batch_of, build, small

ROWS = 4000
LENGTH = 9
MASKINGS = ("nat", "cmlm", "mixed", "glat")


def keys_of(rows: int) -> Tensor:
    return sample_keys(3, torch.tensor(1), torch.arange(rows))


def padded(batch: Batch) -> Batch:
    """The second source and the second target are shorter."""
    labels, padding = batch.labels.clone(), torch.zeros_like(batch.input_ids, dtype=torch.bool)
    labels[1, 2:], padding[1, 5:] = IGNORE, True
    return replace(batch, labels=labels, padding=padding, segment_ids=-padding.int())


def draft_logits(model: TwoDecoders, batch: Batch, hidden: Tensor) -> Tensor:
    """Of the draft, in evaluation."""
    _, source = model._read(batch.input_ids, None, batch)
    assert source is not None
    read, _ = model.backbone.encode(source.embedded, None)
    return model.token_embed(model._draft(batch, hidden, None, read, source.across).x)


def test_any_number_of_places_is_hidden_anywhere_or_at_the_end() -> None:
    held = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 1, 0]).repeat(ROWS // 4)[:, None]
    lengths = held.sum(1)
    found = {masking: hidden_places(masking, keys_of(ROWS), held) for masking in ("nat", "cmlm", "mixed")}
    assert torch.equal(found["nat"], held)
    for masking in ("cmlm", "mixed"):
        hidden = found[masking]
        assert not (hidden & ~held).any()
        counts = hidden.sum(1)
        assert ((counts >= 1) == (lengths > 0)).all()
        shares = torch.bincount(counts[lengths == LENGTH], minlength=LENGTH + 1)[1:] / (ROWS / 4)
        assert (shares - 1 / LENGTH).abs().max() < 0.04, "every number is as likely"
        whole = hidden[lengths == LENGTH]
        suffix = (whole.long().diff(dim=1) >= 0).all(1).float().mean()
        assert suffix == pytest.approx(0.573 if masking == "mixed" else 0.146, abs=0.05)
    places = found["cmlm"][lengths == LENGTH].float().mean(0)
    assert (places - 5 / LENGTH).abs().max() < 0.05
    some = hidden_places("mixed", keys_of(ROWS)[8:16], held[8:16])
    assert torch.equal(some, found["mixed"][8:16]), "a row's own key says all"


def test_glancing_shows_a_share_of_what_was_wrong() -> None:
    held = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 0, LENGTH])[:, None]
    wrong = torch.ones(4, LENGTH, dtype=torch.bool)
    wrong[3, 2:] = False
    hidden = glanced(keys_of(4), held, wrong, torch.tensor(0.5))
    assert hidden.sum(1).tolist() == [LENGTH - 4, 5 - 2, 0, LENGTH - 1]
    assert not (hidden & ~held).any()


@pytest.mark.parametrize("share", [False, True])
def test_a_draft_sees_what_is_shown_on_both_sides_and_nothing_that_is_hidden_or_padding(share: bool) -> None:
    config = small("draft_and_verify", draft={"share": share}, learned_dropout={"eval_rounding": "none"})
    model: Any = build(config).double()
    batch = padded(batch_of(config, sequences=2))
    hidden = torch.tensor([[True, False, True, True, False, True]] * 2)
    logits = draft_logits(model, batch, hidden & (batch.labels != IGNORE))
    for place in range(6):
        labels = batch.labels.clone()
        labels[0, place] = (labels[0, place] + 1) % VOCABULARY
        change = (draft_logits(model, replace(batch, labels=labels), hidden) - logits).abs().amax(-1)
        assert (change[0] > 1e-9).all() if not hidden[0, place] else (change[0] < 1e-12).all(), place
    read = batch.input_ids.clone()
    read[:, 0] = (read[:, 0] + 1) % VOCABULARY
    read[1, 5:] = 3  # which is padding
    other = replace(batch, input_ids=read)
    assert (draft_logits(model, other, hidden) - logits).abs().amax(-1)[:, :2].min() > 1e-9
    alone = replace(other, input_ids=read[1:, :5], labels=batch.labels[1:, :2], padding=None, segment_ids=None)
    alone = replace(alone, decoder_input_ids=batch.labels[1:, :2], samples=batch.samples[1:])
    found = draft_logits(model, alone, hidden[1:, :2])
    torch.testing.assert_close(found[0], draft_logits(model, other, hidden)[1, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_loss_is_of_tokens_drafts_and_lengths(masking: str) -> None:
    config = small(
        "draft_and_verify",
        learned_dropout={"enabled": False},
        draft={"masking": masking, "weight": 0.7, "length_weight": 0.3},
    )
    model: Any = build(config).double()
    batch = padded(batch_of(config, sequences=3))
    held, keys = batch.labels != IGNORE, sample_keys(batch.seed, batch.step, batch.samples)
    if masking == "glat":
        first = draft_logits(model, batch, held).argmax(-1)
        hidden = glanced(keys, held, first != batch.labels, torch.tensor(0.5 - 0.2 * 5 / 10_000))
    else:
        hidden = hidden_places(masking, keys, held)
    nats = functional.cross_entropy(draft_logits(model, batch, hidden).transpose(1, 2), batch.labels, reduction="none")
    draft = nats[hidden].sum() / (held.sum() * (0.5 if masking in ("cmlm", "mixed") else 1.0))
    memory = model._read(batch.input_ids, None, batch)[1].embedded
    lengths = model.backbone.lengths(model.backbone.encode(memory, None)[0], batch.padding)
    length = functional.cross_entropy(lengths, held.sum(1) - 1)
    output = model(batch)
    own = output.metrics["cross_entropy"]
    torch.testing.assert_close(output.metrics["draft_cross_entropy"], draft)
    torch.testing.assert_close(output.metrics["length_cross_entropy"].double(), length, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.loss, own + 0.7 * draft + 0.3 * length, rtol=1e-6, atol=0)
    checked = model.eval()(batch)
    torch.testing.assert_close(checked.loss, own)
    if masking != "glat":  # validation of which hides all
        torch.testing.assert_close(checked.metrics["draft_cross_entropy"], draft)


def test_a_decoder_that_reads_the_draft_learns_nothing_of_the_target_from_it() -> None:
    config = small("draft_and_verify", draft={"refine": True, "masking": "nat"}, learned_dropout={"enabled": False})
    model: Any = build(config).double()
    batch = padded(batch_of(config, sequences=2))
    found = model.predict(batch.input_ids, None, batch)
    other = torch.where(batch.labels == IGNORE, IGNORE, (batch.labels + 1) % VOCABULARY)
    torch.testing.assert_close(
        model.predict(batch.input_ids, None, replace(batch, labels=other)), found, rtol=0, atol=0
    )
    torch.nn.init.normal_(model.backbone.marks.weight)
    assert (model.predict(batch.input_ids, None, batch) - found).abs().amax(-1).min() > 1e-6, "it does read it"


def test_it_learns_targets_drafts_and_lengths_by_heart() -> None:
    changes: dict[str, Any] = {"width": 32, "heads": 4, "learned_dropout": {"enabled": False}}
    draft = {"masking": "glat", "share": True, "length_weight": 1.0}
    config = small("draft_and_verify", draft=draft, **changes)
    model: Any = build(config)
    batch = batch_of(config, sequences=16)
    labels = batch.labels.masked_fill(torch.arange(6) > torch.arange(16)[:, None] % 6, IGNORE)
    batch = replace(batch, labels=labels, padding=torch.zeros_like(batch.input_ids, dtype=torch.bool))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(130):
        output = model(replace(batch, step=torch.tensor(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    metrics = model.eval()(batch).metrics
    assert {n: v for n, v in metrics.items() if n.endswith("cross_entropy") and v.item() > 0.1} == {}
