"""Texts with labels: text i is document i of the stream, its tokens and behind them its labels."""

from collections.abc import Iterator
from typing import Self

import numpy as np

from data_pipeline.config import LabelsConfig
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.pair_windows import PairWindows
from data_pipeline.sampling.windows import Origin
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.token_stream import TokenStream


class LabelWindows(PairWindows):
    """Read like `PairWindows`. A row holds a text in its first T columns, cut off behind T tokens and -1 behind it, and
    in the other T the label of each token, or that of the text in the first of them; -1 where there is none."""

    def __init__(self, stream: TokenStream, context: int, vocab_size: int, labels: LabelsConfig) -> None:
        """Raises DataError when there are no texts."""
        super().__init__(stream, context, vocab_size)
        self._vocab_size, self._labels = vocab_size, labels

    @classmethod
    def of(cls, dataset: Dataset, split: Split, context: int, source: str | None = None) -> Self:
        """Of the stream of `split`, of one source or of all. Raises DataError when there are no texts."""
        manifest = dataset.manifest
        assert manifest.labels is not None
        return cls(TokenStream(dataset, split, source), context, manifest.tokenizer.vocab_size, manifest.labels)

    def origin(self, index: int) -> Origin:
        """Where a text comes from."""
        batch, offset = (int(place[0]) for place in self.places(np.array([index])))
        return Origin(*self._stream.shard_at(batch, offset), [(index, self._pair(batch, offset)[0])])

    def lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens of the texts, and labels, one or as many, int64 [n] each, as they are read through.

        Raises DataError for a damaged shard.
        """
        for batch in range(self._stream.num_batches):
            starts = self._stream.bounds(batch).tolist()
            pairs = [[len(part) for part in self._pair(batch, offset)] for offset in starts]
            sizes = np.array(pairs, np.int64).reshape(-1, 2)
            yield sizes[:, 0], sizes[:, 1]

    def _pair(self, batch: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """The text's tokens, and its labels: one, or one of each token."""
        stored = self._stream.document(batch, offset)
        count = int((stored >= self._vocab_size).argmax())
        tokens, labels = stored[:count], stored[count:].astype(np.int64) - self._vocab_size
        labels[labels == self._labels.values - 1] = -1
        if self._labels.kind == "sequence":
            return tokens, labels
        found = np.full(count, -1, np.int64)
        found[count - len(labels) :] = labels  # a question before the text has none
        return tokens, found
