"""The tokens of a split as one stream: record batches of memory-mapped shards, one after the other."""

import os
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.ingest.splits import Split
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import ShardFacts
from data_pipeline.storage.shards import Shard

_MAX_OPEN_SHARDS = 512  # Each is a memory map, of which Linux allows a process 65,530, and there may be many sources.


class _Opened(NamedTuple):
    """A shard and which record batches of the stream are mapped of it."""

    shard: Shard
    batches: list[int]


class TokenStream:
    """A source's stream, or those of all sources, one after the other in the order of the manifest."""

    def __init__(self, dataset: Dataset, split: Split, source: str | None = None) -> None:
        self.name = f"the {split} split{f' of source {source}' if source is not None else ''} of {dataset.name}"
        self._dataset = dataset
        self._shards = dataset.shards_of(split, source)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        self._first_batch = np.cumsum([0, *(shard.batches for shard in self._shards)])
        self._batch_tokens = dataset.manifest.batch_tokens
        self.num_tokens = int(self._starts[-1])
        self.num_batches = int(self._first_batch[-1])
        self._checked = np.zeros(self.num_batches, bool)  # kept when a shard is closed, which many are again and again
        self._first_document = np.cumsum([0, *(shard.documents for shard in self._shards)])
        self.num_documents = int(self._first_document[-1])
        self.sources = list(dict.fromkeys(shard.source for shard in self._shards))
        """Names of the sources that have tokens in it, in the order of the stream."""
        numbers = {name: number for number, name in enumerate(self.sources)}
        self._source = np.array([numbers[shard.source] for shard in self._shards], np.int64)
        self._forget()

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens of the stream lie, int64 [n]: number of the record batch, and offset in it, int64 [n]."""
        shards = self._starts.searchsorted(positions, "right") - 1
        batches, offsets = np.divmod(positions - self._starts[shards], self._batch_tokens)
        return self._first_batch[shards] + batches, offsets

    def sources_of(self, batches: np.ndarray) -> np.ndarray:
        """Number in `sources` of what these record batches are of, int64 of any shape."""
        return self._source[self._first_batch.searchsorted(batches, "right") - 1]

    def source_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each of `sources` ends, int64 [sources]: in tokens, and in documents."""
        last = np.flatnonzero(np.diff(self._source, append=-1)) + 1
        return self._starts[last], self._first_document[last]

    def mapped(self) -> dict[int, np.ndarray]:
        """Tokens of the record batches that are open."""
        if self._pid != os.getpid():
            self._forget()
        return self._tokens

    def document_places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin, int64 [n]: number of the record batch, and offset in it, int64 [n].

        Raises DataError for a damaged shard.
        """
        batches, offsets = np.empty_like(numbers), np.empty_like(numbers)
        shards = self._first_document.searchsorted(numbers, "right") - 1
        for which in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == which)
            first, inner = int(self._first_batch[which]), numbers[rows] - self._first_document[which]
            counts = self._counts.get(which)
            if counts is None:
                of_shard = range(first, int(self._first_batch[which + 1]))
                counts = self._counts[which] = np.cumsum([0, *(len(self.bounds(batch)) for batch in of_shard)])
            batches[rows] = first + counts.searchsorted(inner, "right") - 1
            inner -= counts[batches[rows] - first]
            for row, batch, number in zip(rows.tolist(), batches[rows].tolist(), inner.tolist(), strict=True):
                offsets[row] = self.bounds(batch)[number]
        return batches, offsets

    def document(self, batch: int, offset: int) -> np.ndarray:
        """Tokens of the document that begins at a place; a view if it lies in one record batch."""
        bounds = self.bounds(batch)
        which = int(bounds.searchsorted(np.int32(offset), "right"))
        if which < len(bounds):
            return self._tokens[batch][offset : int(bounds[which])]
        parts = [self._tokens[batch][offset:]]
        for behind in range(batch + 1, self.num_batches):
            bounds = self.bounds(behind)
            parts.append(self._tokens[behind][: int(bounds[0]) if len(bounds) else None])
            if len(bounds):
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def batch(self, batch: int) -> np.ndarray:
        """Tokens of a record batch."""
        if batch not in self.mapped():
            self.open(batch)
        return self._tokens[batch]

    def bounds(self, batch: int) -> np.ndarray:
        """Where documents begin in a record batch, int32 [documents], ascending."""
        if batch not in self.mapped():
            self.open(batch)
        return self._bounds[batch]

    def open(self, batch: int) -> None:
        """Maps a record batch of the stream, compared with its hash when it is first touched; of too many shards the
        first one opened goes.

        Raises DataError when the shard is damaged or another one.
        """
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        facts, inner = self._shards[which], batch - int(self._first_batch[which])
        if which not in self._opened:
            if len(self._opened) >= self._dataset.max_open_shards(_MAX_OPEN_SHARDS):
                for gone in self._opened.pop(next(iter(self._opened))).batches:
                    del self._tokens[gone], self._bounds[gone]
            self._opened[which] = _Opened(self._dataset.shard(facts), [])
        shard, batches = self._opened[which]
        tokens, bounds = shard.read(inner, check=not self._checked[batch])
        wanted = min(self._batch_tokens, facts.tokens - inner * self._batch_tokens)
        if len(tokens) != wanted:
            raise DataError(
                f"shard {facts.path}: batch {inner} holds {len(tokens)} tokens, the manifest says {wanted}: another "
                "file? `duet data verify` tells"
            )
        batches.append(batch)
        self._tokens[batch] = tokens
        self._bounds[batch] = bounds
        self._checked[batch] = True

    def join(self, batch: int, offset: int, out: np.ndarray) -> None:
        """Copies what begins at a place and runs on over record batches; -1 behind the end of the stream."""
        filled = 0
        while filled < len(out):
            if batch == self.num_batches:
                out[filled:] = -1
                return
            if batch not in self._tokens:
                self.open(batch)
            part = self._tokens[batch][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            batch, offset = batch + 1, 0

    def shards_of(self, first: int, last: int) -> list[ShardFacts]:
        """The shards that hold the tokens from `first` to `last`."""
        low, high = self._starts.searchsorted([first, last], "right")
        return self._shards[int(low) - 1 : int(high)]

    def shards_of_documents(self, first: int, end: int) -> list[ShardFacts]:
        """The shards that hold the documents from `first` to `end` - 1; one that runs on may reach into the next."""
        low = int(self._first_document.searchsorted(first, "right")) - 1
        return self._shards[low : int(self._first_document.searchsorted(end, "left")) + 1]

    def shard_at(self, batch: int, offset: int) -> tuple[str, int]:
        """Path of the shard that holds a place, relative to the dataset, and the token's number in it."""
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        return self._shards[which].path, (batch - int(self._first_batch[which])) * self._batch_tokens + offset

    def document_at(self, batch: int, offset: int) -> int:
        """Number of the document in the stream, from 0, that a place belongs to."""
        which = int(self._first_batch.searchsorted(batch, "right")) - 1
        before = sum(shard.documents for shard in self._shards[:which])
        for number in range(int(self._first_batch[which]), batch + 1):
            bounds = self.bounds(number)
            before += len(bounds) if number < batch else int(bounds.searchsorted(np.int32(offset), "right"))
        return before - 1

    def _forget(self) -> None:
        """Memory maps are made anew in another process."""
        self._pid = os.getpid()
        self._tokens: dict[int, np.ndarray] = {}
        self._bounds: dict[int, np.ndarray] = {}
        self._counts: dict[int, np.ndarray] = {}  # documents before each record batch of a shard
        self._opened: dict[int, _Opened] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps stay behind."""
        return {**self.__dict__, "_tokens": {}, "_bounds": {}, "_opened": {}}
