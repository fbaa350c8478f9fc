"""Samples of each step for one rank. The order depends on the position alone: any world size reads the same steps."""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

from data_pipeline.errors import DataError
from data_pipeline.sampling.kinds import AnyWindows
from data_pipeline.sampling.sample_plan import Plan

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
    no token. Pairs, int64 [n, 2 T]: sources and targets side by side."""
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
    ) -> None:
        """`start`: samples already seen; `documents`: tell where they begin.

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

    def __iter__(self) -> Iterator[StepSamples]:
        """Steps from `start` on. Raises DataError for a damaged shard, and where the data end."""
        return itertools.chain.from_iterable(self.groups())

    def groups(self) -> Iterator[list[StepSamples]]:
        """The same steps in groups that are read, or fail, as one: of a step, of two, and so on to 2^18 tokens."""
        share = self._global_batch // self._world_size
        ahead, first = max(1, _PLANNED_SAMPLES // share), self._start
        size, largest = 1, max(1, _GROUP_TOKENS // (share * self._width))
        while True:
            self._plan.prefetch(first)
            # The last step before the end of the data is whole.
            steps = (self._plan.schedule.extend(first + ahead * self._global_batch) - first) // self._global_batch
            firsts = first + np.arange(max(1, min(steps, ahead))) * self._global_batch
            positions = self._plan.schedule.share(firsts, self._global_batch, self._rank, self._world_size)
            places = [found.reshape(positions.shape) for found in self._plan.places(positions.ravel())]
            begin = 0
            while begin < len(firsts):
                group = slice(begin, begin + size)
                yield self._read(positions[group], *(found[group].ravel().tolist() for found in places))
                begin, size = begin + size, min(2 * size, largest)
            first += len(firsts) * self._global_batch

    def _read(
        self, positions: np.ndarray, sources: list[int], batches: list[int], offsets: list[int]
    ) -> list[StepSamples]:
        """The steps of `positions`, int64 [steps, n]; where the samples lie, in the same order."""
        steps, share = positions.shape
        out = np.empty((steps * share, self._width), np.int64)
        starts: list[np.ndarray] = []
        for windows, its_batches, its_offsets, rows in self._by_source(sources, batches, offsets):
            windows.copy(its_batches, its_offsets, rows, out)
            if self._documents:
                starts.append(windows.document_starts(its_batches, its_offsets, rows))
        return [
            StepSamples(*step)
            for step in zip(
                torch.from_numpy(positions).unbind(),
                torch.from_numpy(out).split(share),
                _by_step(np.sort(np.concatenate(starts)), steps, share * self._width) if starts else [None] * steps,
                strict=True,
            )
        ]

    def _by_source(
        self, sources: list[int], batches: list[int], offsets: list[int]
    ) -> Iterator[tuple[AnyWindows, Sequence[int], Sequence[int], Sequence[int]]]:
        """Places and rows of each source in a group."""
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


def _by_step(starts: np.ndarray, steps: int, tokens: int) -> list[np.ndarray]:
    """Splits ascending places in a group into those of each step, of so many tokens, counted from its own first."""
    cuts = starts.searchsorted(np.arange(steps + 1) * tokens).tolist()
    return [starts[begin:end] - step * tokens for step, (begin, end) in enumerate(itertools.pairwise(cuts))]


class Loader:
    """Endless iterator of a reader's steps; one thread reads ahead. Close it (or use `with`) to end the thread."""

    def __init__(self, reader: Reader) -> None:
        self._stop = threading.Event()
        self._group: list[StepSamples] = []
        self._unread: deque[StepSamples] = deque()
        self._starved = False
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
            self._take()
        if self._unread:
            return self._unread.popleft()
        assert self._error
        self.close()
        raise self._error

    def wait(self, give_up: Callable[[], object]) -> None:
        """Until the next step can be had at once, or until `give_up()`, which is asked every 50 ms, is true."""
        while not self._unread and not self._error and not give_up():
            with contextlib.suppress(queue.Empty):
                self._take(_POLL_SECONDS)

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

    def _take(self, timeout: float | None = None) -> None:
        """Takes a group, or an error. Raises queue.Empty if there is none in time."""
        self._starved = True
        item = self._ready.get(timeout=timeout)
        self._starved = False
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._spent.put(self._group)
            self._group = item
            self._unread.extend(item)

    def _fill(self, reader: Reader) -> None:
        room = _PREFETCH_GROUPS
        try:
            for group in reader.groups():
                starved = self._starved
                self._ready.put(group)
                room -= 1
                # One that waits has the lock first: it would ask for it at each row of the next group.
                while starved or not room or not self._spent.empty():
                    self._spent.get()
                    room += 1
                    starved = False
                if self._stop.is_set():
                    return
        except BaseException as error:  # Re-raised in the consumer.
            self._ready.put(error)
