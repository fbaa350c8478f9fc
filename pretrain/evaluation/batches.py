"""From windows of tokens to what a model is shown, on the device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loading.loader import StepSamples
from data_pipeline.sampling.kinds import AnyWindows
from data_pipeline.storage.dataset import Dataset
from model.batch import Batch, RowExchange
from pretrain.config.schema import Config
from pretrain.objectives.objective import Objective, Setting

_VALIDATION_SEED = 0
"""What is random in validation is the same in every run and at every step."""


class Batches:
    """Makes batches of windows. What is in them does not depend on ranks or on the size of a micro-batch; where ranks
    share rows, each gets its positions of them."""

    def __init__(self, device: torch.device, objective: Objective, exchange: RowExchange | None = None) -> None:
        """`exchange`: among the ranks that share rows."""
        self.objective = objective
        self._exchange = exchange
        self.in_order = None if objective.in_order is None else Batches(device, objective.in_order(objective.setting))
        """Of the same text, for bits per byte (`Objective.in_order`)."""
        self._device = device

    @classmethod
    def of(
        cls, config: Config, dataset: Dataset, device: torch.device, exchange: RowExchange | None = None
    ) -> "Batches":
        """As the configuration asks.

        Raises:
            DataError: the objective is not for what the dataset holds, or its tokenizer lacks pieces that it needs.
        """
        config.objective.check(dataset)
        head = config.model.label_head
        setting = Setting(
            config.model.context,
            dataset.tokenizer,
            document_mask=config.model.document_mask,
            mask_boundaries=config.data.mask_boundaries,
            packed=config.data.packing == "best_fit",
            two_sequences=config.model.traits.two_sequences,
            targets=config.model.lengths[1],
            target_span=config.model.target_span,
            label_kind=head.kind if head else "none",
            labels=(head and head.labels) or (),
        )
        return cls(device, config.objective(setting), exchange)

    def of_step(self, samples: StepSamples, micro_batch: int, step: int, seed: int) -> list[Batch]:
        """A rank's share of a step in micro-batches."""
        made = []
        windows, positions = np.asarray(samples.tokens), np.asarray(samples.positions)  # both are the host's
        size = micro_batch * windows.shape[1]
        for number, first in enumerate(range(0, len(windows), micro_batch)):
            starts, share = samples.document_starts, slice(first, first + micro_batch)
            if starts is not None:
                begin, end = np.searchsorted(starts, [number * size, (number + 1) * size])
                starts = starts[begin:end] - number * size
            made.append(self._batch(windows[share], positions[share], starts, step, seed))
        return made

    def of_validation(self, windows: AnyWindows, indices: np.ndarray) -> Batch:
        """Windows of held-out text by number, at least one; a row that counts for nothing if there is none."""
        tokens, starts = np.full((1, windows.width), -1, np.int64), np.empty(0, np.int64)
        if len(indices):
            tokens = windows.read(indices)
            if self.objective.needs_documents:
                batches, offsets = windows.places(indices)
                starts = windows.document_starts(batches.tolist(), offsets.tolist(), range(len(indices)))
        return self._batch(tokens, indices if len(indices) else np.zeros(1, np.int64), starts, 0, _VALIDATION_SEED)

    def sources_of_labels(self, windows: AnyWindows, indices: np.ndarray, batch: Batch) -> np.ndarray:
        """Number in `windows.sources` of the source that each label of `of_validation` is of, int64 [B, labels]; or
        [B, 1] where those of a window are all of one."""
        sources = windows.sources_of(indices)
        if batch.query_positions is not None:
            return np.take_along_axis(sources, batch.query_positions.cpu().numpy(), axis=1)
        sources = self.objective.label_sources(sources)
        if self._exchange is None or sources.shape[1] == 1:
            return sources
        return np.split(sources, self._exchange.size, axis=1)[self._exchange.rank]

    def _batch(
        self, windows: np.ndarray, positions: np.ndarray, starts: np.ndarray | None, step: int, seed: int
    ) -> Batch:
        """See `Objective.arrays`."""
        arrays = self.objective.arrays(windows, positions, starts if self.objective.needs_documents else None, seed)
        tensors: dict[str, Any] = {name: self._put(array) for name, array in arrays.items()}
        at = torch.full((), step, device=self._device)
        batch = Batch(samples=self._put(positions), step=at, seed=seed, **tensors)
        return batch if self._exchange is None else batch.shared(self._exchange)

    def _put(self, array: np.ndarray) -> Tensor:
        """On the device; a copy to a GPU is not waited for."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
