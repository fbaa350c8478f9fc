"""Bytes of a plain, .gz or .zst file to text, with every fault named by file and place."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from data_pipeline.errors import DataError

CHUNK_BYTES = 2**18
MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a JSONL file."""

Errors = Literal["strict", "replace"]


@dataclass
class ReadCounts:
    """What reading a source came to; filled while its text is consumed."""

    documents: int = 0
    """Documents with text."""
    bytes: int = 0
    """UTF-8 bytes of text."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    replaced: int = 0
    """Undecodable bytes and lone surrogates that became U+FFFD."""
    input_bytes: int = 0
    """Bytes taken from the files as they lie on disk (compressed, if they are)."""


class _ZstdReader(io.RawIOBase):
    """Frames of a .zst file. Unlike zstandard's stream_reader it notices that the last frame is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._output:
            # Small bites, since a highly compressed bite may unpack to a thousand times its size.
            self._input = self._input or self._raw.read(2**14)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The unpacked bytes of `path`, and the file below them (whose `tell` is the progress).

    Raises DataError for a file that cannot be opened or whose compressed data are damaged or cut off.
    """
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw), raw  # type: ignore[misc]
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdReader(raw), CHUNK_BYTES), raw
            else:
                yield raw, raw
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated {path.suffix} data: {error}; fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, final: bool, errors: Errors, where: str, offset: int, counts: ReadCounts) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8: {error.reason}; "
                "convert the file, or set data.errors=replace to put U+FFFD in place of such bytes"
            ) from None
    # Each undecodable byte becomes one surrogate, which valid UTF-8 cannot contain: so they can be counted.
    text, used = codecs.utf_8_decode(data, "surrogateescape", final)
    text, replaced = re.subn("[\udc80-\udcff]", "\ufffd", text)
    counts.replaced += replaced
    return text, used


def read_plain(path: Path, errors: Errors, counts: ReadCounts) -> Iterator[str]:
    """The text of a plain-text file in chunks, newlines untouched. Raises DataError (file, byte offset) as `strict`."""
    with open_binary(path) as (file, raw):
        base, offset, pending, final = counts.input_bytes, 0, b"", False
        while not final:
            chunk = file.read(CHUNK_BYTES)
            counts.input_bytes = base + raw.tell()
            final = not chunk
            pending += chunk
            text, used = _decode(pending, final, errors, str(path), offset, counts)
            pending, offset = pending[used:], offset + used
            if text:
                yield text


def read_jsonl(path: Path, text_key: str, errors: Errors, counts: ReadCounts) -> Iterator[str]:
    """The text of each object of a JSONL file; blank lines are no objects.

    Raises DataError that names file and line: no JSON object, no string under `text_key`, not UTF-8, or a line above
    MAX_LINE_BYTES.
    """
    with open_binary(path) as (file, raw):
        base, offset, number = counts.input_bytes, 0, 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            counts.input_bytes = base + raw.tell()
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where} (at byte {offset}) is longer than {MAX_LINE_BYTES} bytes; is it JSON Lines, one object "
                    "a line? Split larger documents, or store each as a plain-text file (these have no limit)"
                )
            text, _ = _decode(line, True, errors, where, offset, counts)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                yield _text_of(text, text_key, errors, where, counts)


def _text_of(line: str, text_key: str, errors: Errors, where: str, counts: ReadCounts) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object: {error}; here: {line[:80]!r}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object but a {type(record).__name__}: {line[:80]!r}")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where} has no key {text_key!r}; its keys: {keys}. Set text_key of the source to one of them")
    text = record[text_key]
    if not isinstance(text, str):
        strings = ", ".join(repr(key) for key, value in record.items() if isinstance(value, str)) or "none"
        raise DataError(f"{where}: {text_key!r} is a {type(text).__name__}, not a string; keys with strings: {strings}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: {text_key!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no "
                "text; mend the file, or set data.errors=replace to put U+FFFD in its place"
            ) from None
        text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
        counts.replaced += replaced
    return text
