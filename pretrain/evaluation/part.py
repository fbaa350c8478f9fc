"""A part of the held-out text that stands for all of it: the same windows each time, spread over the sources."""

from typing import NamedTuple

import numpy as np

from data_pipeline.sampling.kinds import AnyWindows
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.storage.dataset import Dataset


class HeldOutPart(NamedTuple):
    """Some of the windows."""

    windows: np.ndarray
    """Their numbers, ascending, int64 [n]."""
    bytes_per_label: dict[str, float]
    """UTF-8 bytes of the whole held-out text over its labels, of each source; "" of all together."""


def choose(windows: AnyWindows, number: int | None, dataset: Dataset) -> HeldOutPart | None:
    """So many of the held-out windows; None for all of them, of which there may be fewer.

    They lie evenly in each source, which has as many as its share of the windows, and at least one if the number allows
    that. Of windows that hold documents of several sources, evenly among all.
    """
    if number is None or number >= len(windows):
        return None
    ends = windows.source_ends()
    sizes = np.diff(ends, prepend=0)
    chosen = [
        end - size + (2 * np.arange(count) + 1) * size // (2 * count)
        for end, size, count in zip(ends, sizes, shares(sizes, number), strict=True)
        if count
    ]
    return HeldOutPart(np.concatenate(chosen), _bytes_per_label(windows, dataset))


def shares(sizes: np.ndarray, number: int) -> np.ndarray:
    """`number` of all things in proportion to `sizes`, int64 [n]: one at least of each that is not empty, if the number
    allows it; what rounding leaves goes to those that lack most."""
    ideal = number * sizes / sizes.sum()
    found = np.minimum(sizes, 1) if number >= np.count_nonzero(sizes) else np.zeros_like(sizes)
    missing = np.maximum(ideal - found, 0)
    missing *= (number - found.sum()) / max(missing.sum(), 1e-300)
    whole = missing.astype(np.int64)
    left = number - int(found.sum() + whole.sum())
    whole[np.argsort(whole - missing, kind="stable")[:left]] += 1
    return found + whole


def _bytes_per_label(windows: AnyWindows, dataset: Dataset) -> dict[str, float]:
    """The first token of a stream, or of a packed window, is no label."""
    first = len(windows) if isinstance(windows, PackedWindows) else 1
    labels_per_token = 1 - first / windows.num_tokens
    sources = [source for source in dataset.manifest.sources if source.tokens.get("validation")]
    found = {s.name: s.split_bytes["validation"] / (s.tokens["validation"] * labels_per_token) for s in sources}
    total = sum(source.split_bytes["validation"] for source in sources)
    return found | {"": total / (windows.num_tokens * labels_per_token)}
