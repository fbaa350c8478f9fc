"""A dataset in an object store: its shards come through a cache on the node's own disk, each checked as it arrives."""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import open_lock
from data_pipeline.files.filesystem import is_uri, join, open_raw, resolve, stamp
from data_pipeline.files.private import own_folder
from data_pipeline.storage.manifest import MANIFEST, Manifest, ShardFacts, TokenizerFacts
from data_pipeline.storage.shard_cache import CachedFile, ShardCache
from data_pipeline.tokenize.tokenizer import JSON, MODEL, TOKENIZER, model_file

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_PART_BYTES = 8 * 2**20
_PARTS = 4
_TOKENIZER_BYTES = 2**26
_ATTEMPTS = 5
_FIRST_PAUSE = 0.5


class _DamagedError(Exception):
    """What came is not what the manifest says."""


def default_folder() -> Path:
    """A user's cache in TMPDIR, which on a cluster names the node's own scratch."""
    return Path(tempfile.gettempdir()) / f"duet-cache-{os.getuid()}"


@contextmanager
def unused_cache(path: str, shards: int) -> Iterator[ShardCache | None]:
    """For a URI, a cache that nothing is in, so that everything is fetched; of so many shards, and gone in the end.

    What a killed process left goes first; a live one has locked its own.
    """
    if not is_uri(path):
        yield None
        return
    largest = max((shard.bytes for shard in Manifest.load(path).shards), default=0)
    all_of_user = own_folder(Path(tempfile.gettempdir()) / f"duet-verify-{os.getuid()}")
    with ExitStack() as stack:
        with open_lock(all_of_user / "lock") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            for left in all_of_user.glob("*/"):
                with suppress(BlockingIOError), _locked(left):
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(dir=all_of_user))
            stack.enter_context(_locked(folder))
        stack.callback(shutil.rmtree, folder)
        yield ShardCache(folder, shards * largest + _TOKENIZER_BYTES)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError while another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class RemoteShards:
    """The files of the dataset at `uri`."""

    def __init__(self, uri: str, cache: ShardCache) -> None:
        self._uri = uri
        self.cache = cache
        self._wanted: list[ShardFacts] = []
        self._thread: threading.Thread | None = None
        self._whole: set[str] = set()
        """Names in the cache that this process has compared with their hashes."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process has a thread of its own."""
        return {**self.__dict__, "_thread": None}

    def check_sizes(self, shards: Sequence[ShardFacts]) -> None:
        """As the function."""
        check_sizes(self._uri, shards)

    def get(self, shard: ShardFacts, wait: bool = True) -> CachedFile | None:
        """The shard's file, fetched if it is not in the cache; None if another process does that and not `wait`.

        Raises DataError that names the shard if it cannot be fetched as the manifest describes it."""
        name = f"{shard.xxh3_128}.arrow"
        while True:
            found = self.cache.get(name, shard.bytes, lambda out: self._fetch(shard, out), wait)
            if found is None or name in self._whole:
                return found
            if _hash(found.path) == shard.xxh3_128:
                self._whole.add(name)
                return found
            found.lease.close()
            print(f"warning: {found.path} does not match its hash: it is fetched again", file=sys.stderr)
            if not self.cache.discard(name):
                raise DataError(
                    f"{found.path} does not match its hash, and is in use; end what reads it, and remove it"
                )

    def tokenizer(self, facts: TokenizerFacts) -> CachedFile:
        """The tokenizer's file. Raises DataError if it is missing or another one."""
        if found := self.cache.find(facts.sha256):
            if hashlib.sha256(found.path.read_bytes()).hexdigest() == facts.sha256:
                return found
            found.lease.close()
            self.cache.discard(facts.sha256)
        sought = [join(self._uri, f"{TOKENIZER}/{name}") for name in (MODEL, JSON)]
        there = [name for name in sought if stamp(name)[0]]
        name = (there or sought)[0]
        with open_raw(name) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != facts.sha256:
            raise DataError(f"wrong tokenizer: {name} is not the one the dataset was built with; upload it again")
        found = self.cache.get(facts.sha256, len(content), lambda out: _add(content, out))
        assert found is not None
        return found

    def prefetch(self, shards: list[ShardFacts]) -> None:
        """Fetches these in a thread, in this order, instead of what it was told before and has not begun."""
        self._wanted = shards
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._prefetch, name="shard-prefetch", daemon=True)
            self._thread.start()

    def _prefetch(self) -> None:
        done: set[str] = set()
        while todo := [shard for shard in self._wanted if shard.xxh3_128 not in done]:
            done.add(todo[0].xxh3_128)
            try:
                found = self.get(todo[0], wait=False)
            except DataError:
                return  # Reading comes to it and says so.
            if found is not None:
                found.lease.close()

    def _fetch(self, shard: ShardFacts, out: BinaryIO) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                out.seek(0)
                self._copy(shard, out)
                self._whole.add(f"{shard.xxh3_128}.arrow")
                return
            except (OSError, _DamagedError) as error:
                if attempt == _ATTEMPTS:
                    raise DataError(
                        f"shard {shard.path} of {self._uri} could not be fetched in {_ATTEMPTS} attempts: {error}; "
                        "upload it again if it is damaged there"
                    ) from error
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))

    def _copy(self, shard: ShardFacts, out: BinaryIO) -> None:
        """Fetches in parts, several at a time; written and hashed in order."""
        filesystem, path = resolve(join(self._uri, shard.path))
        digest = xxhash.xxh3_128()
        with filesystem.open_input_file(path) as file, ThreadPoolExecutor(_PARTS) as pool:
            if file.size() != shard.bytes:
                raise _DamagedError(f"it has {file.size()} bytes, the manifest says {shard.bytes}")
            pending: deque[Future[bytes]] = deque()
            for offset in range(0, shard.bytes, _PART_BYTES):
                pending.append(pool.submit(file.read_at, min(_PART_BYTES, shard.bytes - offset), offset))
                if len(pending) == _PARTS:
                    _add(pending.popleft().result(), out, digest)
            while pending:
                _add(pending.popleft().result(), out, digest)
        if digest.hexdigest() != shard.xxh3_128:
            raise _DamagedError("it does not match its hash")


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_PART_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _add(data: bytes, out: BinaryIO, digest: "xxhash.xxh3_128 | None" = None) -> None:
    out.write(data)
    if digest is not None:
        digest.update(data)


def check_sizes(uri: str, shards: Sequence[ShardFacts]) -> None:
    """One listing of the store against the manifest. Raises DataError that names what is missing or cut off."""
    sizes = _sizes(uri)
    for shard in shards:
        if sizes.get(shard.path) != shard.bytes:
            state = f"has {sizes[shard.path]} bytes" if shard.path in sizes else "is missing"
            raise DataError(
                f"shard {shard.path} of {uri} {state}, the manifest says {shard.bytes} bytes; upload it again"
            )


def upload(folder: Path, uri: str) -> int:
    """Copies a dataset into a store: shards, then tokenizer, then the manifest, so that a dataset is there when it is
    complete. Returns how many shards were copied; those that are there by name and size are not.

    Raises DataError for another dataset there, and if the store refuses."""
    manifest, sizes = Manifest.load(folder), _sizes(uri)
    if MANIFEST in sizes and (there := Manifest.load(uri)).fingerprint != manifest.fingerprint:
        raise DataError(f"another dataset is at {uri}: {there.fingerprint[:12]}; choose another place")
    todo = [shard.path for shard in manifest.shards if sizes.get(shard.path) != shard.bytes]
    tokenizer = str(model_file(folder / TOKENIZER).relative_to(folder))
    filesystem, base = resolve(uri)
    try:
        for parent in sorted({str(Path(name).parent) for name in (*todo, tokenizer)}):
            filesystem.create_dir(f"{base}/{parent}")
        for name in (*todo, tokenizer, MANIFEST):
            _send(folder / name, filesystem, f"{base}/{name}")
    except OSError as error:
        raise DataError(f"{uri} cannot be written: {error}; what is there is kept, run it again") from error
    return len(todo)


def _sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below a URI, by one listing."""
    from pyarrow.fs import FileSelector

    filesystem, base = resolve(uri)
    try:
        found = filesystem.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {error}") from error
    return {info.path.removeprefix(base).strip("/"): info.size for info in found}


def _send(file: Path, filesystem: "FileSystem", path: str) -> None:
    with open(file, "rb") as source, filesystem.open_output_stream(path, compression=None) as out:
        while chunk := source.read(_PART_BYTES):
            out.write(chunk)
