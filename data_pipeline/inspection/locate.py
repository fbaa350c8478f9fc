"""From a sample back to the documents it was cut from."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.sampling.sample_plan import Plan
from data_pipeline.sampling.windows import Origin


class Passage(NamedTuple):
    """Where one sample's tokens lie."""

    source: str
    window: int
    origin: Origin


def locate(plan: Plan, positions: np.ndarray) -> Iterator[Passage]:
    """The samples at these positions. Raises DataError for positions behind the end of the data."""
    sources, indices = plan.at(positions)
    names = list(plan.windows)
    for source, index in zip(sources.tolist(), indices.tolist(), strict=True):
        yield Passage(names[source], index, plan.windows[names[source]].origin(index))
