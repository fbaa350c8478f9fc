"""Pairs of source and target: pair i is document i of the stream, two texts that each end with end-of-text."""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.windows import Origin
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import ShardFacts
from data_pipeline.storage.token_stream import TokenStream


class PairWindows:
    """Read like `Windows`. A row holds the source in its first T columns and the target in the other T: each with its
    end-of-text, cut off behind T tokens, and -1 behind it."""

    def __init__(self, stream: TokenStream, context: int, eos_id: int) -> None:
        """Raises DataError when there are no pairs."""
        self.context = context
        self.width = 2 * context
        self.num_tokens = stream.num_tokens
        self.sources = stream.sources
        self._stream = stream
        self._eos_id = eos_id
        if not len(self):
            raise DataError(f"{stream.name} has no pairs")

    @classmethod
    def of(cls, dataset: Dataset, split: Split, context: int, source: str | None = None) -> Self:
        """Of the stream of `split`, of one source or of all. Raises DataError when there are no pairs."""
        return cls(TokenStream(dataset, split, source), context, dataset.manifest.tokenizer.eos_id)

    def __len__(self) -> int:
        """Number of pairs."""
        return self._stream.num_documents

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The pairs `indices`, int64 [n], as int64 [n, 2 T]; -1 where no token is."""
        out = np.empty((len(indices), self.width), np.int64)
        batches, offsets = self.places(indices)
        self.copy(batches.tolist(), offsets.tolist(), range(len(out)), out)
        return out

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the pairs `indices` begin: number of the record batch in the stream, and offset in it, int64 [n]."""
        return self._stream.document_places(np.asarray(indices, np.int64))

    def copy(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Copies the pairs at these places into these rows of `out`, int64 [B, 2 T]."""
        for row, batch, offset in zip(rows, batches, offsets, strict=True):
            for text, column in zip(self._pair(batch, offset), (0, self.context), strict=True):
                end = column + min(len(text), self.context)
                out[row, column:end] = text[: self.context]
                out[row, end : column + self.context] = -1

    def document_starts(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """None: a row is one document."""
        return np.empty(0, np.int64)

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Number in `sources` of the source of each token, int64 [n, 2 T]: of the document's, in all of the row."""
        return np.repeat(self._stream.sources_of(self.places(indices)[0])[:, None], self.width, axis=1)

    def source_ends(self) -> np.ndarray:
        """How many pairs there are up to the end of each of `sources`, int64 [sources]."""
        return self._stream.source_ends()[1]

    def origin(self, index: int) -> Origin:
        """Where a pair comes from: source and target, of the same document."""
        batch, offset = (int(place[0]) for place in self.places(np.array([index])))
        return Origin(
            *self._stream.shard_at(batch, offset), [(index, text) for text in self._pair(batch, offset) if len(text)]
        )

    def shards_of(self, first: int, end: int) -> list[ShardFacts]:
        """The shards that hold the pairs from `first` to `end` - 1."""
        return self._stream.shards_of_documents(first, end)

    def lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens of the sources and of the targets, end-of-text included, int64 [n] each, as they are read through.

        Raises DataError for a damaged shard.
        """
        ends, base = np.full(1, -1, np.int64), 0
        for batch in range(self._stream.num_batches):
            tokens = self._stream.batch(batch)
            ends = np.concatenate([ends, np.flatnonzero(tokens == self._eos_id) + base])
            base += len(tokens)
            whole = (len(ends) - 1) // 2 * 2
            sizes = np.diff(ends[: whole + 1]).reshape(-1, 2)  # every pair has two ends, and no text gives one
            yield sizes[:, 0], sizes[:, 1]
            ends = ends[whole:]

    def _pair(self, batch: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._stream.document(batch, offset)
        source = int((tokens == self._eos_id).argmax()) + 1
        return tokens[:source], tokens[source:]
