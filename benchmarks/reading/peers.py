"""What others read the same tokens with: each gives rows of 2,049 tokens in batches of 8, in random order.

A peer's own files are written from the benchmark's token array; data are hot in cache; one process, no workers.
"""

import importlib
import importlib.abc
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.sampling.shuffle import SampleOrder

Batches = Iterator[Any]
CONTEXT, BATCH = 2048, 8


def order(windows: int) -> Iterator[list[int]]:
    """Window numbers in the order that we read them, a batch at a time, worked out in blocks."""
    permutation, position = SampleOrder("peers", 0, windows), 0
    while True:
        block = permutation.windows(np.arange(position, position + 4096)).tolist()
        position += 4096
        yield from (block[at : at + BATCH] for at in range(0, 4096, BATCH))


def megatron(tokens: np.ndarray, ends: np.ndarray, folder: Path) -> Batches:
    """megatron-core: windows put together from documents of an IndexedDataset, as GPTDataset does it after its index
    of samples (worked out before); without its masks, position ids and collation."""
    indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
    prefix = str(folder / "megatron")
    builder = indexed.IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for begin, end in itertools.pairwise([0, *ends.tolist()]):
        builder.add_item(torch.from_numpy(tokens[begin:end].astype(np.int64)))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    dataset = indexed.IndexedDataset(prefix)
    windows = (len(tokens) - 1) // CONTEXT
    starts = np.arange(windows + 1) * CONTEXT
    first = ends.searchsorted(starts, "right")
    offset = starts - np.concatenate([[0], ends])[first]

    def window(number: int) -> np.ndarray:
        begin, last = int(first[number]), int(first[number + 1])
        if begin == last:
            return dataset.get(begin, offset=int(offset[number]), length=CONTEXT + 1)
        parts = [dataset.get(begin, offset=int(offset[number]))]
        parts += [dataset.get(document) for document in range(begin + 1, last)]
        return np.concatenate([*parts, dataset.get(last, length=int(offset[number + 1]) + 1)])

    for numbers in order(windows - 1):
        yield torch.from_numpy(np.stack([window(number) for number in numbers]).astype(np.int64))


def mds(tokens: np.ndarray, ends: np.ndarray, folder: Path) -> Batches:
    """mosaicml-streaming: `ds[i]` of a StreamingDataset of 2,049 tokens a sample. `transformers` and `torchvision` are
    stubs here."""
    sys.meta_path.append(_Stubs())
    streaming = importlib.import_module("streaming")
    windows = (len(tokens) - 1) // CONTEXT
    out = folder / "mds"
    with streaming.MDSWriter(
        out=str(out), columns={"tokens": f"ndarray:uint16:{CONTEXT + 1}"}, size_limit="256mb"
    ) as writer:
        for index in range(windows):
            writer.write({"tokens": tokens[index * CONTEXT : index * CONTEXT + CONTEXT + 1]})
    dataset = streaming.StreamingDataset(local=str(out), batch_size=BATCH)
    for numbers in order(windows):
        yield torch.from_numpy(np.stack([dataset[number]["tokens"] for number in numbers]).astype(np.int64))


def huggingface(tokens: np.ndarray, ends: np.ndarray, folder: Path) -> Batches:
    """datasets, map-style in numpy format: `ds[indices]` of rows of 2,049 tokens."""
    datasets = importlib.import_module("datasets")
    windows = (len(tokens) - 1) // CONTEXT
    rows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)[::CONTEXT][:windows]
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=CONTEXT + 1)})
    path = folder / "datasets"
    datasets.Dataset.from_generator(
        lambda: ({"tokens": row} for row in rows), features=features, cache_dir=str(folder / "cache")
    ).save_to_disk(str(path))
    dataset = datasets.load_from_disk(str(path)).with_format("numpy")
    for numbers in order(windows):
        yield torch.from_numpy(dataset[numbers]["tokens"].astype(np.int64))


def datatrove(tokens: np.ndarray, ends: np.ndarray, folder: Path) -> Batches:
    """datatrove's DatatroveFolderDataset: windows of 2,049 tokens by number."""
    module = importlib.import_module("datatrove.utils.dataset")
    (folder / "datatrove").mkdir()
    tokens.tofile(folder / "datatrove" / "all.ds")
    dataset = module.DatatroveFolderDataset(str(folder / "datatrove"), seq_len=CONTEXT, token_size=2)
    for numbers in order(len(dataset)):
        yield torch.stack([dataset[number]["input_ids"] for number in numbers])


def grain(tokens: np.ndarray, ends: np.ndarray, folder: Path) -> Batches:
    """grain: ArrayRecord, shuffle, map, batch, in the calling thread."""
    library = importlib.import_module("grain")
    records = importlib.import_module("array_record.python.array_record_module")
    windows = (len(tokens) - 1) // CONTEXT
    path = str(folder / "grain.arrayrecord")
    writer = records.ArrayRecordWriter(path, "group_size:1")
    for index in range(windows):
        writer.write(tokens[index * CONTEXT : index * CONTEXT + CONTEXT + 1].tobytes())
    writer.close()
    source = library.sources.ArrayRecordDataSource([path])
    dataset = (
        library.MapDataset.source(source)
        .seed(0)
        .shuffle()
        .repeat()
        .map(lambda record: np.frombuffer(record, np.uint16).astype(np.int64))
        .batch(BATCH)
    )
    for index in range(len(dataset)):
        yield torch.from_numpy(dataset[index])


PEERS: dict[str, Callable[[np.ndarray, np.ndarray, Path], Batches]] = {
    "megatron-core": megatron,
    "mosaicml-streaming": mds,
    "datasets": huggingface,
    "datatrove": datatrove,
    "grain": grain,
}


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for what mosaicml-streaming imports and this benchmark does not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("transformers", "torchvision"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing in it."""


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
