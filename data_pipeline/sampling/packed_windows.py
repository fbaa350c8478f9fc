"""Windows that hold whole documents: what `packing_plan` says of each is copied together, the rest is padding."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.packing_plan import PackingPlan, rule_of
from data_pipeline.sampling.windows import Origin
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.token_stream import TokenStream


class PackedWindows:
    """Read like `Windows`. A row holds slices of documents, at most T + 1 tokens in all, and -1 behind them."""

    def __init__(self, stream: TokenStream, plan: PackingPlan) -> None:
        """`plan`: of this stream."""
        self.context = plan.context
        self.width = plan.context + 1
        self.num_tokens = stream.num_tokens
        self.padding, self.facts = plan.padding, plan.facts
        self.sources = stream.sources
        self._stream = stream
        self._plan = plan

    @classmethod
    def of(cls, dataset: Dataset, split: Split, context: int, source: str | None = None) -> Self:
        """Of the stream of `split`, of one source or of all; `packing_plan.prepare` has to come before.

        Raises DataError when it did not, or its plan is damaged.
        """
        fingerprint = dataset.stream_fingerprint(source, split)
        plan = PackingPlan.of_stream(dataset.path, fingerprint, context, rule_of(dataset))
        return cls(TokenStream(dataset, split, source), plan)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._plan)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The windows `indices`, int64 [n], as int64 [n, T + 1]; -1 where no token is."""
        out = np.empty((len(indices), self.context + 1), np.int64)
        batches, offsets = self.places(indices)
        self.copy(batches.tolist(), offsets.tolist(), range(len(out)), out)
        return out

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the plan tells of the windows `indices`: number of its record batch, and row in it, int64 [n]."""
        return self._plan.places(np.asarray(indices, np.int64))

    def copy(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Copies the windows at these places into these rows of `out`, int64 [B, T + 1]."""
        starts, lengths, counts, ends = self._slices(batches, offsets)
        of_slice = np.repeat(np.fromiter(rows, np.int64, len(rows)), counts)
        first, inner = self._stream.places(starts)
        for row, end in zip(rows, ends[np.cumsum(counts) - 1].tolist(), strict=True):
            out[row, end:] = -1
        tokens = self._stream.mapped()
        places = (of_slice.tolist(), ends.tolist(), lengths.tolist(), first.tolist(), inner.tolist())
        for row, end, length, batch, offset in zip(*places, strict=True):
            if batch not in tokens:
                self._stream.open(batch)
            part = tokens[batch][offset : offset + length]
            if len(part) == length:
                out[row, end - length : end] = part
            else:
                self._stream.join(batch, offset, out[row, end - length : end])

    def document_starts(self, batches: Sequence[int], offsets: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Where documents, and padding, begin in the windows at these places: `row * (T + 1) + column`, int64 [starts].

        Column 0 is left out.
        """
        _, _, counts, ends = self._slices(batches, offsets)
        width = self.context + 1
        places = np.repeat(np.fromiter(rows, np.int64, len(rows)), counts) * width + ends
        return places[ends < width]

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Number in `sources` of the source of each token, int64 [n, T + 1]; 0 where no token is."""
        batches, offsets = self.places(indices)
        starts, lengths, counts, ends = self._slices(batches.tolist(), offsets.tolist())
        out = np.zeros((len(indices), self.width), np.int64)
        rows = np.repeat(np.arange(len(out)), counts)
        sources = self._stream.sources_of(self._stream.places(starts)[0])  # a slice is of one document
        for row, end, length, source in zip(
            rows.tolist(), ends.tolist(), lengths.tolist(), sources.tolist(), strict=True
        ):
            out[row, end - length : end] = source
        return out

    def source_ends(self) -> np.ndarray:
        """The number of windows, int64 [1]: one may hold documents of several sources."""
        return np.array([len(self)])

    def origin(self, index: int) -> Origin:
        """Where the tokens of a window come from."""
        batches, offsets = (place.tolist() for place in self.places(np.array([index])))
        row = self.read(np.array([index]))[0]
        starts, lengths, _, ends = self._slices(batches, offsets)
        places = list(zip(*(found.tolist() for found in self._stream.places(starts)), strict=True))
        documents = [
            (self._stream.document_at(*place), row[end - length : end])
            for place, length, end in zip(places, lengths.tolist(), ends.tolist(), strict=True)
        ]
        return Origin(*self._stream.shard_at(*places[0]), documents)

    def _slices(
        self, batches: Sequence[int], offsets: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of all slices of these windows: first token in the stream, tokens; slices of each window; and the column
        behind each slice."""
        starts, lengths, counts = [], [], []
        for batch, offset in zip(batches, offsets, strict=True):
            view = self._plan.batch(batch)
            first, last = view.bounds[offset : offset + 2].tolist()
            starts.append(view.starts[first:last])
            lengths.append(view.lengths[first:last])
            counts.append(last - first)
        tokens = np.concatenate(lengths, dtype=np.int64)
        ends = np.cumsum(tokens)
        before = np.concatenate([[0], ends[np.cumsum(counts)[:-1] - 1]])
        return np.concatenate(starts), tokens, np.array(counts), ends - np.repeat(before, counts)
