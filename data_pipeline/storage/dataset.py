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

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import is_uri
from data_pipeline.ingest.splits import SPLITS, Split
from data_pipeline.storage.manifest import MANIFEST, Manifest, ShardFacts, SourceFacts
from data_pipeline.storage.remote_shards import RemoteShards, default_folder
from data_pipeline.storage.shard_cache import ShardCache
from data_pipeline.storage.shards import Shard
from data_pipeline.tokenize.tokenizer import TOKENIZER, Tokenizer, model_file

BLOCK_SHARDS = 16
"""Shards in a block of `block` order: a batch comes from this many."""
_MAX_OPEN_SHARDS = 64
_FOOTERS_AT_START = 1024
_MEND = "restore it from a copy, or run `duet data build --overwrite`"


class Dataset:
    """Token streams of a built dataset. Open one with `Dataset.open`."""

    def __init__(self, path: Path | str, manifest: Manifest, remote: RemoteShards | None = None) -> None:
        """`Dataset.open` reads the manifest and checks the shards; `remote`: they are there, and `path` is a URI."""
        self.name = str(path)
        """Its folder or URI."""
        self.path = Path(path) if remote is None else remote.cache.folder
        self.manifest = manifest
        self._remote = remote
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._pid = os.getpid()

    @classmethod
    def open(
        cls, path: str | Path, check: bool = True, cache: ShardCache | None = None, manifest: Manifest | None = None
    ) -> Self:
        """Reads the manifest; with `check`, looks at the shards, not at their contents.

        Existence and size of all (2 us each); footer and batch count of the first 1,024 (100 us each), of others when
        they are first read. Those of a dataset at a URI are compared with one listing, and come through `cache`, each
        compared with its hash. `manifest`: what was read by another process.

        Raises DataError when there is no dataset, or a shard is missing, truncated or has a damaged footer.
        """
        if is_uri(str(path)):
            uri = str(path)
            cache = cache or ShardCache(default_folder(), DataConfig().cache_bytes)
            dataset = cls(uri, manifest or Manifest.load(uri), RemoteShards(uri, cache))
            if check and dataset._remote is not None:
                dataset._remote.check_sizes(dataset.manifest.shards)
            return dataset
        dataset = cls(Path(path), manifest or Manifest.load(path))
        if check:
            for shard in dataset.manifest.shards:
                dataset._check_size(shard)
            for shard in dataset.manifest.shards[:_FOOTERS_AT_START]:
                dataset._open_shard(shard)
        return dataset

    @classmethod
    def of(cls, config: DataConfig, check: bool = True, manifest: Manifest | None = None) -> Self:
        """The dataset that a configuration names, with its cache if it is at a URI; see `open`."""
        cache = None
        if is_uri(config.path):
            # In a folder of its own, since what is there is removed when there is no room.
            cache = ShardCache(
                Path(config.cache, "duet-cache") if config.cache else default_folder(), config.cache_bytes
            )
        return cls.open(config.path, check, cache, manifest)

    @property
    def is_remote(self) -> bool:
        """Whether it is at a URI."""
        return self._remote is not None

    def check_order(self, order: str) -> None:
        """Raises DataError if samples cannot be read in this order: a cache must hold two blocks of each source and
        what is open for validation, or all shards where any may come next."""
        if self._remote is None:
            return
        # A block's windows reach into two more shards at most.
        open_at_once = BLOCK_SHARDS + 2
        streams = [(self.shards_of("train", name), 2 * open_at_once) for name in self.sources()]
        streams.append((self.shards_of("validation"), open_at_once))
        sizes = [(sorted((shard.bytes for shard in stream), reverse=True), most) for stream, most in streams]
        needed = sum(sum(stream[:most]) for stream, most in sizes)
        everything, limit = sum(sum(stream) for stream, _ in sizes), self._remote.cache.limit
        if order == "global" and everything > limit:
            raise DataError(
                f"data.order=global reads all shards of {self.name} at once, and {everything} bytes do not fit into "
                f"data.cache_bytes={limit}: set data.order=block, or raise it"
            )
        if needed > limit:
            raise DataError(
                f"data.cache_bytes={limit} is too little for {self.name}: two blocks of {BLOCK_SHARDS} shards of each "
                f"source, and those open for validation, are {needed} bytes"
            )

    def max_open_shards(self, usual: int) -> int:
        """How many shards of a stream are held open: what is open keeps its place in a cache."""
        return usual if self._fits else BLOCK_SHARDS + 2

    @cached_property
    def _fits(self) -> bool:
        """Whether all shards are on disks of our own, or can be."""
        return self._remote is None or sum(shard.bytes for shard in self.manifest.shards) <= self._remote.cache.limit

    def prefetch(self, shards: list[ShardFacts]) -> None:
        """Has the shards of a remote dataset fetched in the background, in this order."""
        if self._remote is not None:
            self._remote.prefetch(shards)

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

    def tokenizer_file(self) -> Path:
        """Where the model of its tokenizer lies; of a dataset at a URI, in the cache."""
        if self._remote is not None:
            return self._remote.tokenizer(self.manifest.tokenizer).path
        return model_file(self.path / TOKENIZER)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this dataset. Raises DataError if the file there is missing or another one, or is not what
        the manifest says of it."""
        if self._remote is not None:
            found = self._remote.tokenizer(self.manifest.tokenizer)
            with found.lease:
                tokenizer, path = Tokenizer.load(found.path), found.path
        else:
            path = model_file(self.path / TOKENIZER)
            tokenizer = Tokenizer.load(path)
        facts = self.manifest.tokenizer
        if tokenizer.sha256 != facts.sha256:
            raise DataError(
                f"wrong tokenizer: {path} has sha256 {tokenizer.sha256[:12]}, the dataset was built with "
                f"{facts.sha256[:12]}; restore that file, or run `duet data build --overwrite`"
            )
        for key in ("vocab_size", "eos_id", "unk_id"):
            if getattr(tokenizer, key) != getattr(facts, key):
                raise DataError(
                    f"{self.name}/{MANIFEST} is damaged: {key} of its tokenizer is {getattr(facts, key)}, and {path} "
                    f"has {getattr(tokenizer, key)}; {_MEND}"
                )
        return tokenizer

    def verify(
        self,
        progress: Callable[[int, int], None] | None = None,
        threads: int = 4,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Reads everything, compares all hashes, counts what is there; `progress` gets (bytes done, bytes in all).

        Of `parts` processes that share the work, each does its `part`.

        Raises DataError that names the first damaged, swapped or missing file, and the place in it.
        """
        if part == 0:
            self.tokenizer()
        shards = self.manifest.shards[part::parts]
        total = sum(shard.bytes for shard in shards)
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
            errors = [error for error in pool.map(check, shards) if error is not None]
        if errors:
            raise errors[0]

    def _verify_shard(self, shard: ShardFacts, advance: Callable[[int], None]) -> None:
        if self._remote is None:
            self._check_size(shard)
        opened = self._open_shard(shard)
        digest = xxhash.xxh3_128()
        with open(opened.path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != shard.xxh3_128:
            self._explain(opened.path, digest.hexdigest())
        tokens = documents = 0
        for batch in range(opened.num_batches):
            ids = opened.tokens(batch)
            tokens += len(ids)
            documents += len(opened.rows(batch)) - 1 - opened.continues(batch)
            if (highest := int(ids.max())) >= self.manifest.stored_ids or ids.min() < 0:
                raise DataError(
                    f"shard {self.name}/{shard.path}: batch {batch} holds token {highest}, the vocabulary has "
                    f"{self.manifest.tokenizer.vocab_size}; the build was wrong, or the manifest is another dataset's"
                )
        if (tokens, documents) != (shard.tokens, shard.documents):
            raise DataError(
                f"shard {self.name}/{shard.path} holds {tokens} tokens and {documents} documents, the manifest says "
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
            if len(self._open) > (_MAX_OPEN_SHARDS if self._remote is None else 1):
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
        if self._remote is not None:
            cached = self._remote.get(facts)
            assert cached is not None
            shard = Shard(cached.path, cached.lease)
        else:
            shard = Shard(self.path / facts.path)
        if shard.num_batches != facts.batches:
            raise DataError(
                f"shard {self.name}/{facts.path} has {shard.num_batches} batches, the manifest says {facts.batches}: "
                "another file?"
            )
        return shard

    def _explain(self, path: Path, found: str) -> None:
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
