"""From windows to batches: each objective in the model's shape, whatever the size of a micro-batch."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.loading.loader import StepSamples
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.batch import IGNORE, Batch
from pretrain.config.schema import load
from pretrain.evaluation.batches import Batches
from tests.model.helpers import configured
from tests.objectives import objective as of_name

CPU = torch.device("cpu")
OBJECTIVES = ("causal", "prefix", "masked", "span_corruption", "permutation")
CONTEXT = 32


def step_samples(rows: int = 6) -> StepSamples:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 60, (rows, CONTEXT + 1), generator=generator)
    starts = np.sort(np.random.default_rng(0).choice(np.arange(rows * (CONTEXT + 1)), 20, replace=False))
    return StepSamples(torch.arange(100, 100 + rows), tokens, starts[starts % (CONTEXT + 1) > 0])


def batches(objective: Any, dataset: Path, document_mask: bool = False) -> Batches:
    tokenizer = Dataset.open(dataset).tokenizer()
    setting = {"document_mask": document_mask, "targets": 8, "target_span": 3}
    return Batches(CPU, of_name(objective, CONTEXT, tokenizer, **setting))


@pytest.mark.parametrize("context", [10, 11, 17, 64, 100, 333, 512, 2048])
def test_the_model_knows_the_lengths_that_span_corruption_makes(context: int) -> None:
    tokenizer: Any = SimpleNamespace(sentinel_ids=list(range(10, 500)), eos_id=1)
    made = of_name("span_corruption", context, tokenizer).arrays(
        np.full((1, context + 1), 5), np.zeros(1, np.int64), None, 0
    )
    inputs, labels = made["input_ids"], made["labels"]
    config = configured(architecture="encoder_decoder", context=context)
    assert (inputs.shape[1], labels.shape[1]) == config.lengths


@pytest.mark.parametrize(
    ("objective", "document_mask"), [*((o, False) for o in OBJECTIVES), ("causal", True), ("masked", True)]
)
def test_micro_batches_are_parts_of_the_whole(objective: Any, document_mask: bool, marked_dataset: Path) -> None:
    made, samples = batches(objective, marked_dataset, document_mask), step_samples()
    [whole], parts = made.of_step(samples, 6, 7, seed=3), made.of_step(samples, 2, 7, seed=3)
    assert len(parts) == 3
    for field in fields(Batch):
        value = getattr(whole, field.name)
        if field.name in ("step", "seed") or value is None:
            assert all(getattr(part, field.name) == value for part in parts)
        else:
            assert torch.equal(torch.cat([getattr(part, field.name) for part in parts]), value), field.name


def test_documents_are_where_the_reader_says(dataset: Path) -> None:
    samples = step_samples()
    [batch] = batches("causal", dataset, document_mask=True).of_step(samples, 6, 1, seed=0)
    assert batch.segment_ids is not None and batch.position_ids is not None and samples.document_starts is not None
    starts = {tuple(divmod(int(start), CONTEXT + 1)) for start in samples.document_starts}
    for row in range(6):
        for place in range(1, CONTEXT):
            begins = (row, place) in starts
            assert (batch.segment_ids[row, place] != batch.segment_ids[row, place - 1]) == begins
            assert batch.position_ids[row, place] == (0 if begins else batch.position_ids[row, place - 1] + 1)
            assert (batch.labels[row, place - 1] == IGNORE) == begins


def test_boundaries_alone_can_be_left_out() -> None:
    samples = step_samples()
    assert samples.document_starts is not None
    made = Batches(CPU, of_name(mask_boundaries=True))
    [batch] = made.of_step(samples, 6, 1, seed=0)
    [plain] = Batches(CPU, of_name()).of_step(samples, 6, 1, seed=0)
    assert made.objective.needs_documents and batch.segment_ids is None and batch.position_ids is None
    row, column = np.divmod(samples.document_starts, CONTEXT + 1)
    changed = torch.zeros(6, CONTEXT, dtype=torch.bool)
    changed[row, column - 1] = True
    assert torch.equal(batch.labels, torch.where(changed, IGNORE, plain.labels))
    settings: tuple[dict[str, Any], ...] = ({}, {"mask_boundaries": True}, {"packed": True}, {"document_mask": True})
    assert [of_name(**setting).predicts_every_token for setting in settings] == [True, False, False, False]


def test_a_decoder_reads_what_it_wrote(marked_dataset: Path) -> None:
    tokenizer = Dataset.open(marked_dataset).tokenizer()
    [batch] = batches("span_corruption", marked_dataset).of_step(step_samples(), 6, 1, seed=0)
    assert batch.decoder_input_ids is not None
    assert (batch.decoder_input_ids[:, 0] == tokenizer.eos_id).all()
    assert torch.equal(batch.decoder_input_ids[:, 1:], batch.labels[:, :-1])
    assert (batch.labels[:, 0] == tokenizer.sentinel_ids[0]).all()


def test_what_lies_behind_the_text_is_padding(marked_dataset: Path) -> None:
    samples = step_samples()
    samples.tokens[2, 20:] = -1

    def made(objective: Any) -> Batch:
        return batches(objective, marked_dataset).of_step(samples, 6, 1, seed=0)[0]

    def counts(labels: Tensor) -> list[bool]:
        return (labels != IGNORE).any(dim=1).tolist()

    masked = made("masked")
    assert masked.segment_ids is not None
    assert (masked.segment_ids == -1).nonzero()[:, 0].unique().tolist() == [2]
    assert (masked.segment_ids[2] == -1).tolist() == [place >= 20 for place in range(CONTEXT)]
    assert (masked.labels[2, 20:] == IGNORE).all()
    assert made("span_corruption").labels[2].unique().tolist() == [IGNORE]
    assert counts(made("span_corruption").labels) == [row != 2 for row in range(6)]
    assert all((made(objective).input_ids >= 0).all() for objective in OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation_is_the_same_each_time(objective: Any, marked_dataset: Path) -> None:
    windows = Windows.of(Dataset.open(marked_dataset), "validation", CONTEXT, partial=True)
    made = batches(objective, marked_dataset)
    first, again = (made.of_validation(windows, np.arange(4)) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    alone = made.of_validation(windows, np.array([2]))
    assert torch.equal(alone.input_ids[0], first.input_ids[2])
    nothing = made.of_validation(windows, np.empty(0, np.int64))
    assert (nothing.labels == IGNORE).all()


@pytest.mark.parametrize(
    ("objective", "message"), [("masked", "has no <mask>: add it"), ("span_corruption", "needs 2 sentinels")]
)
def test_pieces_that_are_missing_are_named(objective: Any, message: str, dataset: Path) -> None:
    with pytest.raises(DataError, match=message):
        batches(objective, dataset)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model/encoder-tiny", "data.objective=causal"], "sees every token, the next one included"),
        (["model/decoder-tiny", "data.objective=masked"], "does not fit model.architecture=decoder_only"),
        (["data.objective=prefix", "model.document_mask=true"], "whatever documents are in it"),
        (["data.objective=next"], "data.objective=next: no such objective; there are causal, prefix, masked, span"),
        (["data.objective=prefix", "data.mask_boundaries=true"], "data.objective=prefix has not"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(args)
