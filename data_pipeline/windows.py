"""Windows of a token stream: copied out of memory-mapped shards, with the places where documents begin."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipeline.corpus import Split
from data_pipeline.errors import DataError
from data_pipeline.manifest import ShardFacts
from data_pipeline.shards import Shard

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

_MAX_OPEN_SHARDS = 512  # Each is a memory map, of which Linux allows a process 65,530, and there may be many sources.


class _Opened(NamedTuple):
    """A shard and which record batches of the stream are mapped of it."""

    shard: Shard
    batches: list[int]


class Windows:
    """Window i of a stream: tokens [i * T, i * T + T], T = context: every token is predicted once.

    The stream is a source's, or those of all sources, one after the other in the order of the manifest. Windows run on
    over documents, batches, shards and sources. What is left behind the last whole window is dropped, unless `partial`:
    then it is one more window.
    """

    def __init__(
        self,
        dataset: "Dataset",
        split: Split,
        context: int,
        partial: bool = False,
        source: str | None = None,
        check: bool = False,
    ) -> None:
        """`check`: compare each record batch with its hash when it is first touched.

        Raises DataError when the stream holds too few tokens for one window.
        """
        self.context = context
        self.split = split
        self._dataset = dataset
        self._check = check
        self._shards = dataset.shards_of(split, source)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        self._first_batch = np.cumsum([0, *(shard.batches for shard in self._shards)])
        self._batch_tokens = dataset.manifest.batch_tokens
        self.num_tokens = int(self._starts[-1])
        self._num_windows = (self.num_tokens - 1 + (context - 1 if partial else 0)) // context
        self._forget()
        if context < 1 or self._num_windows < 1:
            of_source = f" of source {source}" if source is not None else ""
            raise DataError(
                f"the {split} split{of_source} of {dataset.name} has {self.num_tokens} tokens: too few for one window "
                f"of context {context} (it needs {2 if partial else context + 1}); use a shorter context, or more text"
            )

    def __len__(self) -> int:
        """Number of windows."""
        return self._num_windows

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The windows `indices`, int64 [n], as int64 [n, T + 1]; positions behind the stream's end are -1."""
        out = np.empty((len(indices), self.context + 1), np.int64)
        batches, offsets = self.places(indices)
        self.copy(batches.tolist(), offsets.tolist(), range(len(out)), out)
        return out

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows `indices` begin: number of the record batch in the stream, and offset in it, int64 [n]."""
        starts = np.asarray(indices, np.int64) * self.context
        shards = self._starts.searchsorted(starts, "right") - 1
        batches, offsets = np.divmod(starts - self._starts[shards], self._batch_tokens)
        return self._first_batch[shards] + batches, offsets

    def copy(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Copies the windows that begin at these places into these rows of `out`, int64 [B, T + 1].

        Places come from `places`, many at once: for a few, that takes longer than the copy.
        """
        tokens, width = self._mapped(), self.context + 1
        for row, batch, offset in zip(rows, batches, offsets, strict=True):
            if batch not in tokens:
                self._open(batch)
            part = tokens[batch][offset : offset + width]
            if len(part) == width:
                out[row] = part
            else:
                self._join(batch, offset, out[row])

    def document_starts(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Where documents begin in the windows at these places, as `row * (T + 1) + column`, int64 [starts].

        Column 0 is left out: a window begins with a document, or within one, and either way starts a sequence.
        """
        tokens, width = self._mapped(), self.context + 1
        found, shifts, counts = [], [], []
        for row, batch, offset in zip(rows, batches, offsets, strict=True):
            if batch not in tokens:
                self._open(batch)
            bounds = self._bounds[batch]
            # In the type of the bounds, or the search would convert them all.
            first, last = bounds.searchsorted(np.array((offset + 1, offset + width), np.int32)).tolist()
            starts = bounds[first:last]
            if offset + width > len(tokens[batch]):
                starts = np.concatenate([starts, self._starts_behind(batch, offset)])
            found.append(starts)
            shifts.append(row * width - offset)
            counts.append(len(starts))
        return np.concatenate(found, dtype=np.int64) + np.repeat(shifts, counts)

    def shards_of(self, first: int, end: int) -> list[ShardFacts]:
        """The shards that hold the windows from `first` to `end` - 1."""
        low = int(self._starts.searchsorted(first * self.context, "right")) - 1
        high = int(self._starts.searchsorted(end * self.context, "right"))  # A window has one more token.
        return self._shards[low:high]

    def shard_at(self, batch: int, offset: int) -> tuple[str, int]:
        """Path of the shard that holds a place, relative to the dataset, and the token's number in it."""
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        return self._shards[which].path, (batch - int(self._first_batch[which])) * self._batch_tokens + offset

    def document_at(self, batch: int, offset: int) -> int:
        """Number of the document in the stream, from 0, that a place belongs to."""
        self._mapped()
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        before = sum(shard.documents for shard in self._shards[:which])
        for number in range(int(self._first_batch[which]), batch + 1):
            if number not in self._tokens:
                self._open(number)
            bounds = self._bounds[number]
            before += len(bounds) if number < batch else int(bounds.searchsorted(np.int32(offset), "right"))
        return before - 1

    def _mapped(self) -> dict[int, np.ndarray]:
        """Tokens of the record batches that are open."""
        if self._pid != os.getpid():
            self._forget()
        return self._tokens

    def _open(self, batch: int) -> None:
        """Maps a record batch of the stream; of too many shards the first one opened goes."""
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        facts, inner = self._shards[which], batch - int(self._first_batch[which])
        if which not in self._opened:
            if len(self._opened) >= self._dataset.max_open_shards(_MAX_OPEN_SHARDS):
                for gone in self._opened.pop(next(iter(self._opened))).batches:
                    del self._tokens[gone], self._bounds[gone]
            self._opened[which] = _Opened(self._dataset.shard(facts), [])
        shard, batches = self._opened[which]
        if self._check:
            shard.check_batch(inner)
        tokens, rows = shard.tokens(inner), shard.rows(inner)
        wanted = min(self._batch_tokens, facts.tokens - inner * self._batch_tokens)
        if len(tokens) != wanted:
            raise DataError(
                f"shard {facts.path}: batch {inner} holds {len(tokens)} tokens, the manifest says {wanted}: another "
                "file? `duet data verify` tells"
            )
        batches.append(batch)
        self._tokens[batch] = tokens
        self._bounds[batch] = rows[1 if shard.continues(inner) else 0 : -1]

    def _join(self, batch: int, offset: int, out: np.ndarray) -> None:
        """A window that runs on over record batches."""
        filled = 0
        while filled < len(out):
            if batch == self._first_batch[-1]:
                out[filled:] = -1
                return
            if batch not in self._tokens:
                self._open(batch)
            part = self._tokens[batch][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            batch, offset = batch + 1, 0

    def _starts_behind(self, batch: int, offset: int) -> np.ndarray:
        """Starts behind the first record batch of a window, counted from the begin of that batch."""
        before, end, found = 0, offset + self.context + 1, []
        while (before := before + len(self._tokens[batch])) < end and batch + 1 < self._first_batch[-1]:
            batch += 1
            if batch not in self._tokens:
                self._open(batch)
            bounds = self._bounds[batch]
            found.append(bounds[: bounds.searchsorted(np.int32(end - before))] + before)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _forget(self) -> None:
        """Memory maps are made anew in another process."""
        self._pid = os.getpid()
        self._tokens: dict[int, np.ndarray] = {}
        self._bounds: dict[int, np.ndarray] = {}
        self._opened: dict[int, _Opened] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps stay behind."""
        return {**self.__dict__, "_tokens": {}, "_bounds": {}, "_opened": {}}
