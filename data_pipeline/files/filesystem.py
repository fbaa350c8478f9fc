"""Input files by name: a local path, or a URI that pyarrow.fs knows; plain or packed, each fault named by file."""

import bz2
import functools
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

import zstandard

from data_pipeline.errors import DataError
from data_pipeline.files.formats import check_packing, packing

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CHUNK_BYTES = 2**18
_URI = re.compile(r"[a-z][a-z0-9+.-]+://")


class _Zstd:
    """A frame of a .zst file, with the face of bz2's and lzma's decompressors."""

    needs_input = True

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._frame.decompress(data)

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


class _FrameReader(io.RawIOBase):
    """The frames of a packed file. Unlike the libraries' own readers it notices that the last one is cut off, and does
    not take what is behind a frame, and is none, for the end. Padding with zeros is no frame."""

    def __init__(self, raw: BinaryIO, frame: Callable[[], Any]) -> None:
        self._raw = raw
        self._make = frame
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._output:
            if self._frame is None or self._frame.needs_input:
                # Small bites, since a highly compressed bite may unpack to a thousand times its size.
                self._input = self._input or self._raw.read(2**14)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last frame is cut off")
                    return 0
            if self._frame is None:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    continue
                self._frame = self._make()
            self._output = memoryview(self._frame.decompress(self._input, CHUNK_BYTES))
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def is_uri(name: str) -> bool:
    """Whether `name` is a URI (s3://bucket/key, gs://…, file:///…), not a path."""
    return _URI.match(name) is not None


def absolute(path: str) -> str:
    """A path that means the same from everywhere; a URI does already."""
    return path if is_uri(path) else str(Path(path).absolute())


@contextmanager
def as_os_errors() -> Iterator[None]:
    """A network that fails is an OSError, whatever library notices it."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):  # what huggingface_hub calls
            raise
        raise OSError(str(error)) from error


@contextmanager
def open_raw(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file as it is stored; seekable. Raises DataError for a file that cannot be opened or read."""
    try:
        if is_uri(name):
            filesystem, path = resolve(name)
            with as_os_errors(), filesystem.open_input_file(path) as remote:
                yield io.BufferedReader(remote, 2**20)
        else:
            with open(name, "rb") as file:
                yield file
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


@contextmanager
def open_binary(name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The unpacked bytes of a file, and the file below them (whose `tell` is the progress).

    Raises DataError for a file that cannot be opened or whose compressed data are damaged or cut off.
    """
    packed = packing(name)
    try:
        with open_raw(name) as raw:
            if packed:
                check_packing(name, raw.read(16))
                raw.seek(0)
            try:
                yield _unpack(raw, packed), raw
            except OSError as error:
                # Else it would count as a file that cannot be opened.
                if isinstance(error, gzip.BadGzipFile) or (packed == ".bz2" and error.errno is None):
                    raise EOFError(str(error)) from None
                raise
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{name}: damaged or truncated {packed} data: {error}; fetch the file again") from error


def _unpack(raw: BinaryIO, packed: str) -> BinaryIO:
    match packed:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_FrameReader(raw, _Zstd), CHUNK_BYTES)
        case ".bz2":
            return io.BufferedReader(_FrameReader(raw, bz2.BZ2Decompressor), CHUNK_BYTES)
        case ".xz":
            return io.BufferedReader(_FrameReader(raw, lzma.LZMADecompressor), CHUNK_BYTES)
    return raw


def stamp(name: str) -> tuple[int, int]:
    """Size and time of the last change in ns: what tells that a file was written to."""
    if not is_uri(name):
        status = Path(name).stat()
        return status.st_size, status.st_mtime_ns
    filesystem, path = resolve(name)
    with as_os_errors():
        info = filesystem.get_file_info(path)
    return info.size or 0, info.mtime_ns or 0


def join(uri: str, name: str) -> str:
    """The URI of what is called `name` below `uri`."""
    parts = urlsplit(uri)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def resolve(uri: str) -> tuple["FileSystem", str]:
    """The file system of a URI, and the path in it. Raises DataError if there is no such file system."""
    filesystem, base = root_of(uri)
    return filesystem, base + unquote(urlsplit(uri).path)


def root_of(uri: str) -> tuple["FileSystem", str]:
    """The file system of a URI, and what goes before its path there. Raises DataError as `resolve` does."""
    parts = urlsplit(uri)
    return _connect(parts._replace(path="/", fragment="").geturl())


@functools.lru_cache(maxsize=64)
def _connect(root: str) -> tuple["FileSystem", str]:
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    try:
        filesystem, base = FileSystem.from_uri(root)
    except ImportError as error:
        raise DataError(f"{root} needs the library huggingface_hub: pip install 'duet-pretrain[hf]'") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{root}: no file system can be reached under it: {error}") from error
    return filesystem, base.rstrip("/")
