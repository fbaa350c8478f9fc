"""A finished dataset: opened lazily, checked cheaply, read without copies until the batch itself."""

import itertools
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from data_pipeline.corpus import Split
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, ShardFacts
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import Tokenizer

TOKENIZER = "tokenizer"
MODEL = "spm.model"
_MAX_OPEN_SHARDS = 1024  # Each is a memory map, of which Linux allows a process 65,530.


class Dataset:
    """Token streams of a built dataset. Open one with `Dataset.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """`Dataset.open` reads the manifest and checks the shards."""
        self.path = path
        self.manifest = manifest
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Checks existence, size, footer and batch count of every shard (50 us each), not their contents.

        Raises DataError when there is no dataset, or a shard is missing, truncated or has a damaged footer.
        """
        dataset = cls(Path(path), Manifest.load(Path(path)))
        for shard in dataset.manifest.shards:
            dataset._check_frame(shard)
        return dataset

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this dataset. Raises DataError if the file there is missing or another one."""
        path = self.path / TOKENIZER / MODEL
        tokenizer = Tokenizer.load(path)
        if tokenizer.sha256 != self.manifest.tokenizer.sha256:
            raise DataError(
                f"wrong tokenizer: {path} has sha256 {tokenizer.sha256[:12]}, the dataset was built with "
                f"{self.manifest.tokenizer.sha256[:12]}; restore that file, or run `duet data build --overwrite`"
            )
        return tokenizer

    def windows(self, split: Split, context: int, partial: bool = False) -> "Windows":
        """Windows of `context` predictions over the stream of `split`; see Windows.

        Raises DataError when the split is too small for one.
        """
        return Windows(self, split, context, partial)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads everything and compares all hashes; `progress` is called with (bytes done, bytes in all).

        Raises DataError that names the first damaged, swapped or missing file, and the place in it.
        """
        self.tokenizer()
        total = sum(shard.bytes for shard in self.manifest.shards)
        done = 0
        for shard in self.manifest.shards:
            self._check_frame(shard)
            digest = xxhash.xxh3_128()
            with open(self.path / shard.path, "rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != shard.xxh3_128:
                self._explain(shard, digest.hexdigest())

    def shard(self, facts: ShardFacts) -> Shard:
        """The open shard; maps are made on first use, and again after a fork."""
        if self._pid != os.getpid():
            self._open.clear()
            self._pid = os.getpid()
        shard = self._open.get(facts.path)
        if shard is None:
            shard = self._open[facts.path] = Shard(self.path / facts.path)
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _check_frame(self, shard: ShardFacts) -> None:
        path = self.path / shard.path
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"shard {path} is missing; restore it, or run `duet data build --overwrite`") from None
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "too long"
            raise DataError(
                f"shard {path} is {state}: {size} bytes, the manifest says {shard.bytes}; restore it from a copy, or "
                "run `duet data build --overwrite`"
            )
        batches = Shard(path).num_batches
        if batches != shard.batches:
            raise DataError(f"shard {path} has {batches} batches, the manifest says {shard.batches}: another file?")

    def _explain(self, shard: ShardFacts, found: str) -> None:
        path = self.path / shard.path
        for other in self.manifest.shards:
            if other.xxh3_128 == found:
                raise DataError(f"swapped shards: {path} has the content of {other.path}; rename them back")
        Shard(path).check_batches()
        raise DataError(
            f"shard {path} does not match its hash, though every batch does (its metadata were changed, or it is "
            "another dataset's); restore it from a copy, or run `duet data build --overwrite`"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps stay behind: a copy in another process makes its own."""
        return {**self.__dict__, "_open": OrderedDict()}


class Windows:
    """Window i of a split: tokens [i * T, i * T + T] of its stream, T = context: every token is predicted once.

    The stream is those of the sources, one after the other in the order of the manifest. Windows run on over documents,
    batches, shards and sources. What is left behind the last whole window is dropped, unless
    `partial`: then it is one more window.
    """

    def __init__(self, dataset: Dataset, split: Split, context: int, partial: bool = False) -> None:
        """Raises DataError when the split holds too few tokens for one window."""
        self.context = context
        self.split = split
        self.num_tokens = dataset.manifest.splits[split].tokens
        self._dataset = dataset
        self._shards = dataset.manifest.shards_of(split)
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in self._shards)]
        self._num_windows = (self.num_tokens - 1 + (context - 1 if partial else 0)) // context
        if context < 1 or self._num_windows < 1:
            raise DataError(
                f"the {split} split of {dataset.path} has {self.num_tokens} tokens: too few for one window of context "
                f"{context} (it needs {2 if partial else context + 1}); use a shorter context, or more text"
            )

    def __len__(self) -> int:
        """Number of windows."""
        return self._num_windows

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The windows `indices`, int64 [n], as int64 [n, T + 1]; positions behind the stream's end are -1."""
        out = np.empty((len(indices), self.context + 1), np.int64)
        for row, index in zip(out, indices.tolist(), strict=True):
            self._copy(index * self.context, row)
        return out

    def _copy(self, start: int, out: np.ndarray) -> None:
        manifest, dataset = self._dataset.manifest, self._dataset
        filled = 0
        while filled < len(out):
            if start >= self.num_tokens:
                out[filled:] = -1
                return
            number = bisect_right(self._starts, start) - 1
            batch, in_batch = divmod(start - self._starts[number], manifest.batch_tokens)
            tokens = dataset.shard(self._shards[number]).tokens(batch)[in_batch : in_batch + len(out) - filled]
            if not len(tokens):
                raise DataError(f"shard {self._shards[number].path} holds fewer tokens than the manifest says")
            out[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            start += len(tokens)
