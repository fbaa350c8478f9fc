"""What a person wants to see of a dataset before training on it."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipeline.ingest.splits import Split
from data_pipeline.storage.dataset import Dataset


def documents(dataset: Dataset, split: Split, source: str | None = None) -> Iterator[list[np.ndarray]]:
    """Each document of `split`, of one source or of all, in stream order: views of its tokens with their EOS, uint16 or
    int32, which together are the document (one view for each record batch it touches)."""
    rows: list[np.ndarray] = []
    for facts in dataset.shards_of(split, source):
        shard = dataset.shard(facts)
        for batch in range(shard.num_batches):
            tokens, bounds = shard.tokens(batch), shard.rows(batch).tolist()
            continues = shard.continues(batch)
            for begin, end in itertools.pairwise(bounds):
                if rows and not continues:
                    yield rows
                    rows = []
                rows.append(tokens[begin:end])
                continues = False
    if rows:
        yield rows


def length_histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) for each power of two that occurs or lies between two that do."""
    counts = Counter(length.bit_length() for length in lengths)
    if not counts:
        return []
    return [(2 ** (bits - 1), 2**bits - 1, counts[bits]) for bits in range(min(counts), max(counts) + 1)]
