"""Windows of a token stream: copied out of memory-mapped shards, with the places where documents begin."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.ingest.splits import Split
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import ShardFacts
from data_pipeline.storage.token_stream import TokenStream


class Origin(NamedTuple):
    """Where the tokens of one window come from."""

    shard: str
    """The shard in which it begins, relative to the dataset."""
    offset: int
    """Of its first token in that shard."""
    documents: list[tuple[int, np.ndarray]]
    """Documents it touches: number in the stream, from 0, and their tokens in the window."""


class Windows:
    """Window i of a stream: tokens [i * T, i * T + T], T = context: every token is predicted once.

    Windows run on over documents, batches, shards and sources. What is left behind the last whole window is dropped,
    unless `partial`: then it is one more window.
    """

    def __init__(self, stream: TokenStream, context: int, partial: bool = False) -> None:
        """Raises DataError when the stream holds too few tokens for one window."""
        self.context = context
        self.width = context + 1
        self.num_tokens = stream.num_tokens
        self.sources = stream.sources
        self._stream = stream
        self._num_windows = (self.num_tokens - 1 + (context - 1 if partial else 0)) // context
        if context < 1 or self._num_windows < 1:
            raise DataError(
                f"{stream.name} has {self.num_tokens} tokens: too few for one window of context {context} (it needs "
                f"{2 if partial else context + 1}); use a shorter context, or more text"
            )

    @classmethod
    def of(
        cls, dataset: Dataset, split: Split, context: int, partial: bool = False, source: str | None = None, **how: bool
    ) -> Self:
        """Of the stream of `split`, of one source or of all. Raises as `Windows`."""
        return cls(TokenStream(dataset, split, source), context, partial)

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
        return self._stream.places(np.asarray(indices, np.int64) * self.context)

    def copy(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Copies the windows that begin at these places into these rows of `out`, int64 [B, T + 1].

        Places come from `places`, many at once: for a few, that takes longer than the copy.
        """
        tokens, width = self._stream.mapped(), self.context + 1
        for row, batch, offset in zip(rows, batches, offsets, strict=True):
            if batch not in tokens:
                self._stream.open(batch)
            part = tokens[batch][offset : offset + width]
            if len(part) == width:
                out[row] = part
            else:
                self._stream.join(batch, offset, out[row])

    def document_starts(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Where documents begin in the windows at these places, as `row * (T + 1) + column`, int64 [starts].

        Column 0 is left out: a window begins with a document, or within one, and either way starts a sequence.
        """
        tokens, width = self._stream.mapped(), self.context + 1
        found, shifts, counts = [], [], []
        for row, batch, offset in zip(rows, batches, offsets, strict=True):
            bounds = self._stream.bounds(batch)
            # In the type of the bounds, or the search would convert them all.
            first, last = bounds.searchsorted(np.array((offset + 1, offset + width), np.int32)).tolist()
            starts = bounds[first:last]
            if offset + width > len(tokens[batch]):
                starts = np.concatenate([starts, self._starts_behind(batch, offset)])
            found.append(starts)
            shifts.append(row * width - offset)
            counts.append(len(starts))
        return np.concatenate(found, dtype=np.int64) + np.repeat(shifts, counts)

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Number in `sources` of the source of each token, int64 [n, T + 1]; behind the stream's end the last one's."""
        positions = np.asarray(indices, np.int64)[:, None] * self.context + np.arange(self.width)
        return self._stream.sources_of(self._stream.places(np.minimum(positions, self.num_tokens - 1))[0])

    def source_ends(self) -> np.ndarray:
        """How many windows begin before the end of each of `sources`, int64 [sources]."""
        tokens, _ = self._stream.source_ends()
        return np.minimum(-(-tokens // self.context), len(self))

    def shards_of(self, first: int, end: int) -> list[ShardFacts]:
        """The shards that hold the windows from `first` to `end` - 1."""
        return self._stream.shards_of(first * self.context, end * self.context)  # a window has one more token

    def origin(self, index: int) -> Origin:
        """Where the inputs of a window come from."""
        tokens = self.read(np.array([index]))[0]
        batch, offset = (int(place[0]) for place in self.places(np.array([index])))
        starts = self.document_starts([batch], [offset], [0]).tolist()
        first = self._stream.document_at(batch, offset)
        bounds = [0, *(start for start in starts if start < self.context), self.context]
        parts = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
        return Origin(*self._stream.shard_at(batch, offset), list(enumerate(parts, first)))

    def _starts_behind(self, batch: int, offset: int) -> np.ndarray:
        """Starts behind the first record batch of a window, counted from the begin of that batch."""
        tokens, before, end, found = self._stream.mapped(), 0, offset + self.context + 1, []
        while (before := before + len(tokens[batch])) < end and batch + 1 < self._stream.num_batches:
            batch += 1
            bounds = self._stream.bounds(batch)
            found.append(bounds[: bounds.searchsorted(np.int32(end - before))] + before)
        return np.concatenate(found) if found else np.empty(0, np.int64)
