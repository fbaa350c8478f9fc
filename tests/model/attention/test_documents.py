"""Documents side by side in a row: each is read as if it came alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures import token_model
from model.architectures.parallel_encoder_decoder.encoder_loss import EncoderLoss
from model.attention.attention import CausalAttention
from model.attention.rule import Rows
from model.attention.visibility import CAUSAL as EARLIER
from model.attention.visibility import Visible
from model.batch import Batch
from model.config.model_config import ModelConfig
from model.layers.noise import sample_keys
from model.masks import learned_dropout
from tests.model.helpers import EVERY, VOCABULARY, batch_of, build, open_masks, small, variant

PACKED = [
    name
    for name, changes in EVERY.items()
    if changes.get("architecture") not in ("encoder_decoder", "draft_and_verify", "two_stream")
    and changes.get("norm") != "batchnorm"  # which refuse it
]
ROWS = ([5, 4, 3], [1, 7, 4], [12])


def packed(config: ModelConfig) -> Batch:
    """Three rows of 12 tokens, with documents of the lengths in ROWS."""
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in ROWS])
    positions = torch.tensor([[p for n in row for p in range(n)] for row in ROWS])
    return replace(batch_of(config), segment_ids=segments, position_ids=positions)


def rows_of(batch: Batch, causal: bool = True) -> Rows:
    ids = batch.input_ids
    return Rows(ids.shape, ids.device, causal, batch.segment_ids, batch.position_ids, batch.prefix_lengths)


def documents() -> list[tuple[int, slice]]:
    """Row and columns of each document."""
    return [(r, slice(sum(row[:i]), sum(row[: i + 1]))) for r, row in enumerate(ROWS) for i in range(len(row))]


def difference(config: ModelConfig) -> float:
    """Largest difference of a logit between a document in its row and the same alone, in evaluation."""
    model = open_masks(build(config)).double()
    batch = packed(config)
    with torch.no_grad():
        together = model.predict(batch.input_ids, None, batch)
        return max(
            (model.predict(batch.input_ids[row : row + 1, place], None)[0] - together[row, place]).abs().max().item()
            for row, place in documents()
        )


@pytest.mark.parametrize("name", PACKED)
def test_a_document_in_a_row_is_read_as_if_alone(name: str) -> None:
    assert difference(variant(name, document_mask=True)) < 1e-12


CAUSAL = CausalAttention.forward


def leaky(
    self: CausalAttention, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible = EARLIER
) -> Tensor:
    """Documents forgotten."""
    return CAUSAL(self, query, key, value, keys, visible._replace(mask=None, causal=self._config.causal))


class LeakyAttention(CausalAttention):
    forward = leaky


@pytest.mark.parametrize("name", PACKED)
def test_the_check_catches_attention_that_leaves_the_document(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalAttention, "forward", leaky)
    assert difference(variant(name, document_mask=True)) > 1e-6


@pytest.mark.parametrize("source", ["attention", "embed"])
def test_the_check_catches_a_mask_that_leaves_the_document(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_dropout, "CausalAttention", LeakyAttention)
    assert difference(small(learned_dropout={"source": source})) > 1e-6


@pytest.mark.parametrize("name", PACKED)
def test_in_training_no_document_knows_of_another(name: str) -> None:
    config = variant(name, document_mask=True)
    model = open_masks(build(config)).double()
    batch = packed(config)
    keys = sample_keys(batch.seed, batch.step, batch.samples)
    changed = batch.input_ids.clone()
    changed[0, 5:9] = (changed[0, 5:9] + 1) % VOCABULARY
    with torch.no_grad():
        logits, others = model.predict(batch.input_ids, keys, batch), model.predict(changed, keys, batch)
    change = (logits - others)[0].abs().amax(dim=-1)
    assert change[:5].max() == change[9:].max() == 0.0
    assert change[5:9].min() > 1e-9


@pytest.mark.parametrize("name", ["bert", "bert_embed", "bert_modern", "bert_batchnorm"])
def test_padding_of_a_segment_of_its_own_changes_nothing(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = batch_of(config)
    segments = torch.zeros(batch.input_ids.shape, dtype=torch.int64).index_fill(1, torch.arange(9, 12), -1)
    padded = model.predict(batch.input_ids, None, replace(batch, segment_ids=segments))
    alone = model.predict(batch.input_ids[:, :9], None)
    torch.testing.assert_close(padded[:, :9], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["decoder", "parallel", "modern", "everywhere_decoder"])
def test_a_prefix_is_read_both_ways_and_the_rest_causally(name: str) -> None:
    config = variant(name)
    model = open_masks(build(config)).double()
    batch = replace(batch_of(config, sequences=1), prefix_lengths=torch.tensor([5]))
    rows = batch.input_ids.repeat(13, 1)  # row t changes token t; the last one none
    for place in range(12):
        rows[place, place] = (rows[place, place] + 1) % VOCABULARY
    prefixes = replace(batch, input_ids=rows, prefix_lengths=torch.full((13,), 5))
    with torch.no_grad():
        logits = model.predict(rows, None, prefixes)
    change = (logits[:-1] - logits[-1]).abs().amax(dim=-1)  # [changed, seen]
    assert change[:5].min() > 1e-9
    assert change[5:].tril(4).max() == 0.0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prefixes", [None, torch.tensor([3, 7, 1])])
def test_both_forms_of_a_mask_say_the_same(causal: bool, prefixes: Tensor | None) -> None:
    batch = replace(packed(small()), prefix_lengths=prefixes)
    row, head, query, key = torch.meshgrid(*(torch.arange(n) for n in (3, 1, 12, 12)), indexing="ij")
    rows = rows_of(batch, causal)
    dense = rows.dense()
    assert torch.equal(rows.blocks().mask_mod(row, head, query, key), dense)
    expected = [
        [
            [
                a.start <= k < a.stop and (not causal or k <= q or (prefixes is not None and k < prefixes[row]))
                for k in range(12)
            ]
            for row_, a in documents()
            if row_ == row
            for q in range(a.start, a.stop)
        ]
        for row in range(3)
    ]
    assert dense[:, 0].tolist() == expected


@pytest.mark.parametrize("name", ["parallel", "modern", "everywhere_embed", "bert"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_and_dense_masks_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = variant(name, document_mask=True)
    model = open_masks(build(config)).double()
    batch = packed(config)
    expected = model.predict(batch.input_ids, None, batch)

    def in_blocks(input_ids: Tensor, batch: Batch, config: ModelConfig) -> Visible:
        return Visible(mask=rows_of(batch, config.causal).blocks(), positions=batch.position_ids)

    monkeypatch.setattr(token_model, "visible_in", in_blocks)
    with torch.no_grad():  # the plain form has no backward pass
        found = model.predict(batch.input_ids, None, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_encoder_loss_begins_anew_with_each_document() -> None:
    loss = EncoderLoss(small(encoder_loss={"kind": "mse"}))
    embedded, output = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)).double()
    together = loss(embedded, output, Visible(positions=packed(small()).position_ids))["encoder_loss"]
    alone = [
        loss(embedded[row : row + 1, place], output[row : row + 1, place])["encoder_loss"] * (place.stop - place.start)
        for row, place in documents()
    ]
    torch.testing.assert_close(together, sum(alone, torch.zeros(())) / 36, rtol=1e-12, atol=0)


def test_a_model_that_is_to_mind_documents_must_be_told_of_them() -> None:
    config = small(document_mask=True)
    with pytest.raises(ValueError, match="does not say where documents are"):
        build(config)(batch_of(config))
    losses: list[Any] = [build(config)(packed(config)).loss for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["everywhere", "t5_modern", "bert_batchnorm", "two_stream", "halting"])
def test_layers_are_traced_without_a_break(name: str) -> None:
    """As `engine.compile` compiles them, one by one; t5 has no documents, but two lengths, bert buffers that change."""
    config = variant(name, layers=1)
    model = open_masks(build(config))
    batch = packed(config) if name == "everywhere" else batch_of(config)
    expected = model(batch).loss
    torch._dynamo.reset()
    layers = [m for m in model.modules() if type(m).__name__ in ("EncoderLayer", "DecoderLayer")]
    for layer in layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(batch).loss, expected)
    assert {int(b) for n, b in model.named_buffers() if n.endswith("tracked")} == ({2} if "batch" in name else set())
