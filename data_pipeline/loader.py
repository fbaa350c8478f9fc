"""Samples of each step for one rank. The order depends on the position alone: any world size reads the same steps."""

import queue
import threading
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel

from data_pipeline.dataset import Windows
from data_pipeline.errors import DataError
from data_pipeline.order import SampleOrder

_PREFETCH_STEPS = 4


class DataState(BaseModel, frozen=True):
    """Where a run stands in its data: the same on all ranks, advanced by the trainer when a step is done."""

    format: Literal[1] = 1
    fingerprint: str
    seed: int
    samples_seen: int = 0
    tokens_seen: int = 0

    def after(self, samples: int, tokens: int) -> Self:
        """The state once `samples` more samples of `tokens` predicted tokens in all are trained on."""
        seen = {"samples_seen": self.samples_seen + samples, "tokens_seen": self.tokens_seen + tokens}
        return self.model_copy(update=seen)

    def check(self, fingerprint: str) -> None:
        """Raises DataError unless `fingerprint` is the one this state counts on."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"the dataset changed: the run was trained on {self.fingerprint[:12]}, data.path now holds "
                f"{fingerprint[:12]}. Restore that dataset, or start a new run from the checkpoint"
            )


class StepSamples(NamedTuple):
    """One rank's share of a step."""

    positions: torch.Tensor
    """Sample positions in the run, int64 [n]."""
    tokens: torch.Tensor
    """Windows at these positions, int64 [n, T + 1]: inputs are [:, :-1], labels [:, 1:]."""


class Loader:
    """Endless iterator of steps; one thread reads ahead. Close it (or use `with`) to end the thread.

    Step k covers positions [N, N + global_batch), N = start + k * global_batch; rank r has each world_size-th
    of them, beginning with the r-th.
    """

    def __init__(
        self, windows: Windows, order: SampleOrder, *, global_batch: int, rank: int, world_size: int, start: int = 0
    ) -> None:
        """`start`: samples already seen. Raises DataError when the ranks cannot share `global_batch` equally."""
        if order.num_windows != len(windows):
            raise ValueError(f"order is over {order.num_windows} windows, there are {len(windows)}")
        if global_batch % world_size:
            below = global_batch // world_size * world_size
            batches = f"{below} or {below + world_size}" if below else str(world_size)
            worlds = [size for size in range(1, world_size) if global_batch % size == 0]
            raise DataError(
                f"a global batch of {global_batch} samples cannot be shared equally by {world_size} ranks: "
                f"use {batches} samples, or {worlds[-1]} ranks"
            )
        self._windows = windows
        self._order = order
        self._global_batch = global_batch
        self._rank = rank
        self._world_size = world_size
        self._stop = threading.Event()
        self._queue: queue.Queue[StepSamples | BaseException] = queue.Queue(_PREFETCH_STEPS)
        self._thread = threading.Thread(target=self._fill, args=(start,), name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        """Itself: going on where it stands."""
        return self

    def __next__(self) -> StepSamples:
        """The next step. Raises what the thread raised (DataError for a damaged shard); StopIteration once closed."""
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def __enter__(self) -> Self:
        """For `with`."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes."""
        self.close()

    def close(self) -> None:
        """Ends the thread; returns when it is gone."""
        self._stop.set()
        while self._thread.is_alive():
            # The thread may wait for room in the queue.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.01)

    def _fill(self, position: int) -> None:
        try:
            while not self._stop.is_set():
                self._queue.put(self._step(position))
                position += self._global_batch
        except BaseException as error:  # Re-raised in the consumer.
            self._queue.put(error)

    def _step(self, position: int) -> StepSamples:
        positions = np.arange(position + self._rank, position + self._global_batch, self._world_size)
        tokens = self._windows.read(self._order.windows(positions))
        return StepSamples(torch.from_numpy(positions), torch.from_numpy(tokens))
