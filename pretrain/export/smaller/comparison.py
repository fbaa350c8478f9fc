"""A model and a smaller one side by side: what they take, how well they predict, and how fast they are here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError
from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.batch import Batch
from model.generation.one_token import OneToken
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.export.portable import write_export
from pretrain.export.use import validating
from pretrain.metric_names import VALIDATION

_ROUNDS, _WRITTEN = 5, 64
"""Of timing, whose median counts; tokens that are written in each."""


class Measured(NamedTuple):
    """A model."""

    parameters: int
    size: int
    """Bytes of its weights in the export."""
    loss: float
    """Validation, in nats a label."""
    read: float
    """Tokens a second of a batch of the held-out text."""
    written: float | None
    """Tokens a second of one text, token after token; None where that is not done with a cache of ours."""


class Shrunk(NamedTuple):
    """What became of a model."""

    changes: list[str]
    """What was taken out, a line a part."""
    before: Measured
    after: Measured


class Validation:
    """The held-out text, over which models are measured."""

    def __init__(self, validate: Callable[[TokenModel], dict[str, float]]) -> None:
        """`validate` as `validating` gives it."""
        self._validate = validate
        self._batch: Batch | None = None

    def loss(self, model: TokenModel) -> float:
        """In nats a label."""
        hook = model.register_forward_pre_hook(self._keep)
        try:
            return self._validate(model)[VALIDATION]
        finally:
            hook.remove()

    def compared(self, before: TokenModel, loss: float, after: TokenModel, size: int | None = None) -> list[Measured]:
        """A model of this loss and a smaller one; `size`: bytes of its weights, if it is the same in fewer bits."""
        losses = [loss, self.loss(after)]
        sizes = [size_of(before.state_dict()), size_of(after.state_dict()) if size is None else size]
        speeds = self._speeds([before.eval(), after.eval()])
        counts = [model.num_parameters() for model in (before, after)]
        return [Measured(*facts[:3], *facts[3]) for facts in zip(counts, sizes, losses, speeds, strict=True)]

    @torch.no_grad()
    def _speeds(self, models: Sequence[TokenModel]) -> list[tuple[float, float | None]]:
        """Of each, reading and writing. They take turns, so that what else the machine does befalls all alike."""
        assert self._batch is not None
        batch, seconds = self._batch, [[(_read(m, self._batch), _write(m)) for m in models] for _ in range(_ROUNDS)]
        found = list[tuple[float, float | None]]()
        for turns in zip(*seconds, strict=True):
            reading = float(batch.num_tokens()) / median(read for read, _ in turns)
            writing = [written for _, written in turns if written is not None]
            found.append((reading, median(writing) if writing else None))
        return found

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._batch is None and isinstance(inputs[0], Batch):
            self._batch = inputs[0]


@contextmanager
def comparing(checkpoint: Checkpoint, config: Config) -> Iterator[Validation]:
    """What compares models over the held-out text of a checkpoint's run. Raises as `evaluate_run`."""
    with validating(checkpoint, config) as validate:
        yield Validation(validate)


def check_new(folder: Path) -> None:
    """Raises CheckpointError if the folder is there already."""
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")


def export_smaller(
    checkpoint: Checkpoint,
    config: Config,
    weights: Mapping[str, Tensor],
    folder: Path,
    model: tuple[TokenModel, float],
    text: Validation,
) -> list[Measured]:
    """Build what a configuration and tensors make, measure it beside a model of that loss, and export it."""
    smaller = registry.build(config.model)
    smaller.load_state_dict(weights)
    found = text.compared(*model, smaller.eval())
    write_export(checkpoint, config, folder, weights=smaller.cpu().state_dict(), loss=found[1].loss)
    return found


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(values.nbytes for values in tensors.values())


def _read(model: TokenModel, batch: Batch) -> float:
    """Seconds."""
    start = perf_counter()
    model(batch)
    _wait(batch.input_ids)
    return perf_counter() - start


def _write(model: TokenModel) -> float | None:
    """Tokens a second, of a text from its first token on."""
    traits = model.config.traits
    if not (traits.cached and traits.causal) or traits.two_sequences:
        return None
    table = model.token_embed.weight
    cache = Cache(torch.zeros(1, dtype=torch.int64, device=table.device), model.config.context)
    one = torch.ones(1, 1, dtype=torch.int64, device=table.device)
    cache.logits(model, one)
    write, count = OneToken.of(model, cache), min(_WRITTEN, model.config.context - 2)
    if count < 1:
        return None
    write(one)
    start = perf_counter()
    for _ in range(count - 1):
        write(one)
    _wait(table)
    return (count - 1) / (perf_counter() - start)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
