"""Samples of each step for one rank. The order depends on the position alone: any world size reads the same steps."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

from data_pipeline.dataset import AnyWindows
from data_pipeline.errors import DataError
from data_pipeline.plan import Plan

_PREFETCH_GROUPS = 4
_POLL_SECONDS = 0.05
_JOIN_SECONDS = 5.0
_GROUP_TOKENS = 2**18  # Steps change hands in groups of so many, since waking a thread costs as much as a small step.
_PLANNED_SAMPLES = 4096  # Permuting a few indices costs as much as permuting thousands.


class StepSamples(NamedTuple):
    """One rank's share of a step."""

    positions: torch.Tensor
    """Sample positions in the run, int64 [n]."""
    tokens: torch.Tensor
    """Windows at these positions, int64 [n, T + 1]: inputs are [:, :-1], labels [:, 1:]; -1 where packed windows have
    no token. Pairs, int64 [n, 2 T]: sources and targets side by side. Pinned if asked for."""
    document_starts: np.ndarray | None
    """Where documents begin, and what is left of a packed window, as `row * (T + 1) + column`, ascending; a row's first
    token is not listed."""


class Reader:
    """Steps one by one, in the calling thread.

    Step k covers positions [N, N + global_batch), N = start + k * global_batch; a rank has each world_size-th of them,
    after a permutation of the batch if several sources are mixed.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        start: int = 0,
        documents: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """`start`: samples already seen; `documents`: tell where they begin; `pin_memory`: for copies to a CUDA device.

        Raises DataError when the ranks cannot share `global_batch` equally.
        """
        if global_batch % world_size:
            below = global_batch // world_size * world_size
            batches = f"{below} or {below + world_size}" if below else str(world_size)
            worlds = [size for size in range(1, world_size) if global_batch % size == 0]
            raise DataError(
                f"a global batch of {global_batch} samples cannot be shared equally by {world_size} ranks: "
                f"use {batches} samples, or {worlds[-1]} ranks"
            )
        self._plan = plan
        self._windows = list(plan.windows.values())
        self._width = self._windows[0].width
        self._global_batch = global_batch
        self._rank = rank
        self._world_size = world_size
        self._start = start
        self._documents = documents
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[StepSamples]:
        """Steps from `start` on. Raises DataError for a damaged shard, and where the data end."""
        share = self._global_batch // self._world_size
        ahead, first = max(1, _PLANNED_SAMPLES // share), self._start
        while True:
            self._plan.prefetch(first)
            # The last step before the end of the data is whole.
            steps = (self._plan.schedule.extend(first + ahead * self._global_batch) - first) // self._global_batch
            firsts = first + np.arange(max(1, min(steps, ahead))) * self._global_batch
            positions = self._plan.schedule.share(firsts, self._global_batch, self._rank, self._world_size)
            sources, batches, offsets = (
                found.reshape(positions.shape) for found in self._plan.places(positions.ravel())
            )
            for step in zip(positions, sources.tolist(), batches.tolist(), offsets.tolist(), strict=True):
                yield self._read(*step)
            first += len(firsts) * self._global_batch

    def _read(self, positions: np.ndarray, sources: list[int], batches: list[int], offsets: list[int]) -> StepSamples:
        shape, starts = (len(positions), self._width), []
        tokens = torch.empty(shape, dtype=torch.int64, pin_memory=True) if self._pin_memory else None
        out = np.empty(shape, np.int64) if tokens is None else tokens.numpy()
        for windows, its_batches, its_offsets, rows in self._by_source(sources, batches, offsets):
            windows.copy(its_batches, its_offsets, rows, out)
            if self._documents:
                starts.append(windows.document_starts(its_batches, its_offsets, rows))
        return StepSamples(
            torch.from_numpy(positions),
            torch.from_numpy(out) if tokens is None else tokens,
            np.sort(np.concatenate(starts)) if starts else None,
        )

    def _by_source(
        self, sources: list[int], batches: list[int], offsets: list[int]
    ) -> Iterator[tuple[AnyWindows, Sequence[int], Sequence[int], Sequence[int]]]:
        """Places and rows of each source in a step."""
        if len(self._windows) == 1:
            yield self._windows[0], batches, offsets, range(len(batches))
            return
        rows: dict[int, list[int]] = {}
        for row, source in enumerate(sources):
            rows.setdefault(source, []).append(row)
        for source, of_source in rows.items():
            yield (
                self._windows[source],
                [batches[row] for row in of_source],
                [offsets[row] for row in of_source],
                of_source,
            )


class Loader:
    """Endless iterator of a reader's steps; one thread reads ahead. Close it (or use `with`) to end the thread."""

    def __init__(self, reader: Reader) -> None:
        self._stop = threading.Event()
        self._group: list[StepSamples] = []
        self._unread: deque[StepSamples] = deque()
        self._error: BaseException | None = None
        self._ready: queue.SimpleQueue[list[StepSamples] | BaseException] = queue.SimpleQueue()
        # What was read goes back to the thread to be freed there: torch gives up the interpreter's lock for each tensor
        # that it frees, and the thread, which waits for that lock, would take it each time.
        self._spent: queue.SimpleQueue[list[StepSamples]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fill, args=(reader,), name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        """Itself: going on where it stands."""
        return self

    def __next__(self) -> StepSamples:
        """The next step. Raises what the thread raised (DataError for a damaged shard); StopIteration once closed."""
        if self._stop.is_set():
            raise StopIteration
        if not self._unread and not self._error:
            self._take(self._ready.get())
        if self._unread:
            return self._unread.popleft()
        assert self._error
        self.close()
        raise self._error

    def wait(self, give_up: Callable[[], object]) -> None:
        """Until the next step can be had at once, or until `give_up()`, which is asked every 50 ms, is true."""
        while not self._unread and not self._error and not give_up():
            with contextlib.suppress(queue.Empty):
                self._take(self._ready.get(timeout=_POLL_SECONDS))

    def __enter__(self) -> Self:
        """For `with`."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes."""
        self.close()

    def close(self) -> None:
        """Ends the thread; a file system that hangs holds it up, and the caller for a few seconds at most."""
        self._stop.set()
        self._spent.put([])
        self._thread.join(_JOIN_SECONDS)

    def _take(self, item: list[StepSamples] | BaseException) -> None:
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._spent.put(self._group)
            self._group = item
            self._unread.extend(item)

    def _fill(self, reader: Reader) -> None:
        group: list[StepSamples] = []
        room = _PREFETCH_GROUPS
        try:
            for step in reader:
                group.append(step)
                if len(group) * step.tokens.numel() >= _GROUP_TOKENS:
                    while not room or not self._spent.empty():
                        self._spent.get()
                        room += 1
                    self._ready.put(group)
                    group = []
                    room -= 1
                if self._stop.is_set():
                    return
        except BaseException as error:  # Re-raised in the consumer.
            if group:
                self._ready.put(group)
            self._ready.put(error)
