"""A finished dataset: opened lazily, checked cheaply, read without copies until the batch itself."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import xxhash

from data_pipeline.corpus import SPLITS, Split
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, ShardFacts, SourceFacts
from data_pipeline.packed_windows import PackedWindows
from data_pipeline.packing_plan import PackingPlan
from data_pipeline.pair_windows import PairWindows
from data_pipeline.shards import Shard
from data_pipeline.stream import TokenStream
from data_pipeline.tokenizer import TOKENIZER, Tokenizer, model_file
from data_pipeline.windows import Windows

_MAX_OPEN_SHARDS = 64
_FOOTERS_AT_START = 1024
_MEND = "restore it from a copy, or run `duet data build --overwrite`"


class Dataset:
    """Token streams of a built dataset. Open one with `Dataset.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """`Dataset.open` reads the manifest and checks the shards."""
        self.path = path
        self.manifest = manifest
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: str | Path, check: bool = True) -> Self:
        """Reads the manifest; with `check`, looks at the shards, not at their contents.

        Existence and size of all (2 us each); footer and batch count of the first 1,024 (100 us each), of others when
        they are first read.

        Raises DataError when there is no dataset, or a shard is missing, truncated or has a damaged footer.
        """
        dataset = cls(Path(path), Manifest.load(Path(path)))
        if check:
            for shard in dataset.manifest.shards:
                dataset._check_size(shard)
            for shard in dataset.manifest.shards[:_FOOTERS_AT_START]:
                dataset._open_shard(shard)
        return dataset

    def sources(self) -> dict[str, SourceFacts]:
        """The sources with tokens to train on, by name, in the order of the manifest."""
        return {source.name: source for source in self.manifest.sources if source.tokens.get("train")}

    def shards_of(self, split: Split, source: str | None = None) -> list[ShardFacts]:
        """The shards of a split in stream order, of one source or of all."""
        return self._streams[split, source]

    @cached_property
    def _streams(self) -> dict[tuple[Split, str | None], list[ShardFacts]]:
        """Made in one pass, since there may be many sources and shards."""
        streams: dict[tuple[Split, str | None], list[ShardFacts]] = {}
        for source in (None, *(source.name for source in self.manifest.sources)):
            streams |= {(split, source): [] for split in SPLITS}
        for shard in self.manifest.shards:
            streams[shard.split, None].append(shard)
            streams[shard.split, shard.source].append(shard)
        return streams

    def stream_fingerprint(self, source: str | None, split: Split = "train") -> str:
        """Names the tokens of a source, or of all, whatever else is in the dataset: keys the order of its samples."""
        manifest = self.manifest
        if manifest.format == 1 and split == "train":  # whose runs know one stream, by the name of the dataset
            return manifest.fingerprint
        digest = hashlib.sha256(f"{manifest.tokenizer.sha256} {manifest.dtype}".encode())
        for shard in self.shards_of(split, source):
            digest.update(f" {shard.tokens} {shard.xxh3_128}".encode())
        return digest.hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this dataset. Raises DataError if the file there is missing or another one."""
        path = model_file(self.path / TOKENIZER)
        tokenizer = Tokenizer.load(path)
        if tokenizer.sha256 != self.manifest.tokenizer.sha256:
            raise DataError(
                f"wrong tokenizer: {path} has sha256 {tokenizer.sha256[:12]}, the dataset was built with "
                f"{self.manifest.tokenizer.sha256[:12]}; restore that file, or run `duet data build --overwrite`"
            )
        return tokenizer

    def windows(
        self, split: Split, context: int, partial: bool = False, source: str | None = None, check: bool = False
    ) -> Windows:
        """Windows of `context` predictions over the stream of `split`, of one source or of all; see Windows.

        `check`: compare each record batch with its hash when it is first touched.

        Raises DataError when the stream is too small for one.
        """
        return Windows(TokenStream(self, split, source, check), context, partial)

    def packed_windows(
        self, split: Split, context: int, source: str | None = None, check: bool = False
    ) -> PackedWindows:
        """The same with documents that are not cut; see PackedWindows. `packing_plan.prepare` has to come before.

        Raises DataError when it did not, or its plan is damaged.
        """
        plan = PackingPlan.of_stream(self.path, self.stream_fingerprint(source, split), context)
        return PackedWindows(TokenStream(self, split, source, check), plan)

    def pairs(self, split: Split, context: int, source: str | None = None, check: bool = False) -> PairWindows:
        """The pairs of a dataset that was built of such; see PairWindows. Raises DataError when there are none."""
        return PairWindows(TokenStream(self, split, source, check), context, self.manifest.tokenizer.eos_id)

    def verify(self, progress: Callable[[int, int], None] | None = None, threads: int = 4) -> None:
        """Reads everything, compares all hashes, counts what is there; `progress` gets (bytes done, bytes in all).

        Raises DataError that names the first damaged, swapped or missing file, and the place in it.
        """
        self.tokenizer()
        total = sum(shard.bytes for shard in self.manifest.shards)
        done = 0
        lock = threading.Lock()
        failed = threading.Event()

        def advance(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                if progress is not None:
                    progress(done, total)

        def check(shard: ShardFacts) -> DataError | None:
            try:
                if not failed.is_set():
                    self._verify_shard(shard, advance)
            except DataError as error:
                failed.set()
                return error
            return None

        with ThreadPoolExecutor(threads) as pool:
            errors = [error for error in pool.map(check, self.manifest.shards) if error is not None]
        if errors:
            raise errors[0]

    def _verify_shard(self, shard: ShardFacts, advance: Callable[[int], None]) -> None:
        self._check_size(shard)
        opened = self._open_shard(shard)
        digest = xxhash.xxh3_128()
        with open(self.path / shard.path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != shard.xxh3_128:
            self._explain(shard, digest.hexdigest())
        tokens = documents = 0
        for batch in range(opened.num_batches):
            ids = opened.tokens(batch)
            tokens += len(ids)
            documents += len(opened.rows(batch)) - 1 - opened.continues(batch)
            if (highest := int(ids.max())) >= self.manifest.tokenizer.vocab_size or ids.min() < 0:
                raise DataError(
                    f"shard {self.path / shard.path}: batch {batch} holds token {highest}, the vocabulary has "
                    f"{self.manifest.tokenizer.vocab_size}; the build was wrong, or the manifest is another dataset's"
                )
        if (tokens, documents) != (shard.tokens, shard.documents):
            raise DataError(
                f"shard {self.path / shard.path} holds {tokens} tokens and {documents} documents, the manifest says "
                f"{shard.tokens} and {shard.documents}: it is another dataset's; {_MEND}"
            )

    def shard(self, facts: ShardFacts) -> Shard:
        """The open shard; maps are made on first use, and again after a fork. Raises DataError if it is damaged."""
        if self._pid != os.getpid():
            self._open.clear()
            self._pid = os.getpid()
        shard = self._open.get(facts.path)
        if shard is None:
            shard = self._open[facts.path] = self._open_shard(facts)
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _check_size(self, shard: ShardFacts) -> None:
        path = f"{self.path}/{shard.path}"
        try:
            size = os.stat(path).st_size  # noqa: PTH116 - a Path costs thrice as much
        except FileNotFoundError:
            raise DataError(f"shard {path} is missing; {_MEND}") from None
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "too long"
            raise DataError(f"shard {path} is {state}: {size} bytes, the manifest says {shard.bytes}; {_MEND}")

    def _open_shard(self, facts: ShardFacts) -> Shard:
        shard = Shard(self.path / facts.path)
        if shard.num_batches != facts.batches:
            raise DataError(
                f"shard {self.path / facts.path} has {shard.num_batches} batches, the manifest says {facts.batches}: "
                "another file?"
            )
        return shard

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


AnyWindows = Windows | PackedWindows | PairWindows
"""What samples can be; all are read alike."""
