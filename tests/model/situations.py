"""Every option that a step can have, and every kind of batch: for what is to hold of all of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.batch import IGNORE, Batch, Counts, Share
from pretrain.config.sections import FinetuneConfig
from pretrain.finetune.lora import adapt
from tests.model.helpers import (
    EVERY,
    FEEDBACK,
    MIXED,
    MIXED_BOTH_WAYS,
    PATTERNED,
    PATTERNED_BOTH_WAYS,
    batch_of,
    build,
    one_of,
    variant,
)

OPTIONS = (*EVERY, *PATTERNED, *PATTERNED_BOTH_WAYS, *FEEDBACK, *MIXED, *MIXED_BOTH_WAYS)
Made = tuple[TokenModel, Batch]


class Alone:
    """A `RowExchange` of one rank, which has all heads and all positions."""

    size, rank = 1, 0

    def heads(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors

    def positions(self, x: Tensor) -> Tensor:
        return x


def optional(name: str, change: Callable[[Batch], Batch] = lambda batch: batch, **changes: Any) -> Made:
    """A variant of `tests.model.helpers` and its batch, changed."""
    config = variant(name, **changes)
    return build(config), change(batch_of(config))


def of_architecture(name: str, **changes: Any) -> Made:
    config = one_of(name, **changes)
    return build(config), batch_of(config)


def adapted(**changes: Any) -> Made:
    """Adapters beside every linear map, with dropout before them."""
    model, batch = optional("modern", **changes)
    adapt(model, FinetuneConfig(kind="lora", rank=2, dropout=0.1), seed=0)
    return model, batch


def documents(batch: Batch) -> Batch:
    """Two in each row."""
    places = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    second = torch.tensor([1, 3, places.shape[1] - 2])[: len(places), None]
    segments = (places >= second).long()
    return replace(batch, segment_ids=segments, position_ids=places - segments * second)


def prefixes(batch: Batch) -> Batch:
    """Rows whose first tokens are seen by all, and of which only the others are to be predicted."""
    lengths = torch.tensor([2, 0, 7])[: len(batch.labels)]
    unseen = torch.arange(batch.labels.shape[1]) + 1 < lengths[:, None]
    return replace(batch, prefix_lengths=lengths, labels=batch.labels.masked_fill(unseen, IGNORE))


def answers(batch: Batch) -> Batch:
    """As of conversations: labels in some places, padding behind them, and means over the labels of more batches."""
    asked = torch.arange(batch.labels.shape[1]) % 4 < 2
    padding = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    padding[0, -2:] = True
    labels = batch.labels.masked_fill(asked | padding, IGNORE)
    counts = Counts(torch.tensor(11.0), torch.tensor(30.0))
    return replace(batch, labels=labels, padding=padding, counts=counts)


def shared(batch: Batch) -> Batch:
    """As ranks have it that share rows; here one."""
    return documents(batch).shared(Alone())


SITUATIONS: dict[str, Callable[..., Made]] = {
    **{name: partial(optional, name) for name in OPTIONS},
    "refined": partial(of_architecture, "refined"),
    "routing, sorted": partial(optional, "routing_near", context=256),
    "lora": adapted,
    "documents": partial(optional, "modern_decoder", documents, document_mask=True),
    "prefixes": partial(optional, "everywhere_decoder", prefixes),
    "answers": partial(optional, "modern_decoder", answers),
    "shared rows": partial(optional, "modern_serial", shared),
}
"""Model and batch of each; keys of the configuration may be changed."""


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with another tensor in place of each."""

    def other(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Counts):
            return Counts(*map(change, value))
        if isinstance(value, Share):
            return replace(value, segment_ids=other(value.segment_ids), position_ids=other(value.position_ids))
        return value

    return replace(batch, **{field.name: other(getattr(batch, field.name)) for field in dataclasses.fields(batch)})
