"""From a sample back to the documents it was cut from."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan import Plan


@dataclass(frozen=True)
class Passage:
    """Where one sample's tokens lie."""

    source: str
    window: int
    shard: str
    """The shard in which it begins, relative to the dataset."""
    offset: int
    """Of its first token in that shard."""
    documents: list[tuple[int, np.ndarray]]
    """Documents it touches: number in the source's training stream, from 0, and their tokens in the window."""


def locate(plan: Plan, positions: np.ndarray) -> Iterator[Passage]:
    """The samples at these positions. Raises DataError for positions behind the end of the data."""
    sources, indices = plan.at(positions)
    names = list(plan.windows)
    for source, index in zip(sources.tolist(), indices.tolist(), strict=True):
        windows = plan.windows[names[source]]
        tokens = windows.read(np.array([index]))[0]
        batch, offset = (int(place[0]) for place in windows.places(np.array([index])))
        starts = windows.document_starts([batch], [offset], [0]).tolist()
        first = windows.document_at(batch, offset)
        bounds = [0, *(start for start in starts if start < plan.context), plan.context]
        parts = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
        shard, in_shard = windows.shard_at(batch, offset)
        yield Passage(names[source], index, shard, in_shard, list(enumerate(parts, first)))
