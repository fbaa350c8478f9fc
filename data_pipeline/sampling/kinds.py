"""What samples can be, and which of them a configuration wants."""

from typing import Literal

from data_pipeline.config import DataConfig
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.label_windows import LabelWindows
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.pair_windows import PairWindows
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset

Kind = Literal["plain", "best_fit", "pairs", "labels"]
AnyWindows = Windows | PackedWindows | PairWindows
"""All are read alike."""


def kind_of(dataset: Dataset, config: DataConfig) -> Kind:
    """Pairs, or texts with labels, where the dataset holds such, else windows as `data.packing` says."""
    if dataset.manifest.labels is not None:
        return "labels"
    return "pairs" if dataset.manifest.pairs else config.packing


def open_windows(
    dataset: Dataset,
    kind: Kind,
    split: Split,
    context: int,
    source: str | None = None,
    *,
    partial: bool = False,
) -> AnyWindows:
    """The samples of a split, of one source or of all. Raises DataError as `of` of the kind does.

    Args:
        partial: plain windows end with one that the text does not fill.
    """
    if kind == "best_fit":
        return PackedWindows.of(dataset, split, context, source)
    if kind == "labels":
        return LabelWindows.of(dataset, split, context, source)
    if kind == "pairs":
        return PairWindows.of(dataset, split, context, source)
    return Windows.of(dataset, split, context, partial, source)
