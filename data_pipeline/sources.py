"""Documents of a source as a stream of pieces of bounded size, in an order that depends on names alone."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.readers import Errors, ReadCounts, open_binary, read_jsonl, read_plain

CUT_RULE = "1 MiB, after the next newline or at 2 MiB"
"""How long documents are cut. Part of the fingerprint, since pieces are tokenized one by one."""
CUT_AFTER = 2**20
CUT_LIMIT = 2**21


class Piece(NamedTuple):
    """A stretch of a document, never empty."""

    text: str
    continues: bool
    """Whether the next piece belongs to the same document."""


def cut(chunks: Iterable[str], after: int = CUT_AFTER, limit: int = CUT_LIMIT) -> Iterator[Piece]:
    """Cuts one document, given in chunks, after the first newline at or past byte `after` of a piece; if there is none
    before byte `limit`, at the last character boundary not past `limit`. How it is chunked makes no difference."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk.encode()
        start = 0
        while (end := _cut_point(buffer, start, after, limit)) is not None:
            yield Piece(buffer[start:end].decode(), True)
            start = end
        del buffer[:start]
    if buffer:
        yield Piece(buffer.decode(), False)


def _cut_point(buffer: bytearray, start: int, after: int, limit: int) -> int | None:
    newline = buffer.find(b"\n", start + after, start + limit)
    end = newline + 1 if newline >= 0 else start + limit
    if end >= len(buffer):  # Nothing is known to follow, and a last piece must not continue.
        return None
    while buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


def kind(file: Path) -> str:
    """How a file is read, which its name says: `jsonl` or `plain`."""
    inner = file.with_suffix("") if file.suffix in (".gz", ".zst") else file
    return "jsonl" if inner.suffix == ".jsonl" else "plain"


class Source:
    """The files of one source: sorted by path, each once."""

    def __init__(self, name: str, key: str, config: SourceConfig) -> None:
        """`key`: where the paths stand in the configuration.

        Raises DataError for a path that does not exist, a glob without a match and an empty directory."""
        self.name = name
        self.text_key = config.text_key
        found = {file.resolve(): file for path in config.paths for file in _expand(key, path)}
        self.files = sorted(found.values())
        self._stamps = [self._stamp(file) for file in self.files]

    @property
    def input_bytes(self) -> int:
        """Size of the files as they lie on disk."""
        return sum(size for size, _ in self._stamps)

    @staticmethod
    def _stamp(file: Path) -> tuple[int, int]:
        status = file.stat()
        return status.st_size, status.st_mtime_ns

    def hashes(self, advance: Callable[[int], None]) -> Iterator[tuple[str, int, str]]:
        """(path, bytes, xxh3_64) of each file as it lies on disk; `advance` is told the bytes of every chunk."""
        for file in self.files:
            digest, size = xxhash.xxh3_64(), 0
            with open_binary(file) as (_, raw):
                while chunk := raw.read(2**20):
                    digest.update(chunk)
                    size += len(chunk)
                    advance(len(chunk))
            yield str(file), size, digest.hexdigest()

    def pieces(self, errors: Errors, counts: ReadCounts) -> Iterator[Piece]:
        """All text, file by file; empty documents are counted as dropped. Raises DataError as the readers do."""
        for file in self.files:
            for document in self._documents(file, errors, counts):
                empty = True
                for piece in cut(document):
                    empty = False
                    counts.bytes += len(piece.text.encode())
                    yield piece
                if empty:
                    counts.dropped["empty"] += 1
                else:
                    counts.documents += 1

    def _documents(self, file: Path, errors: Errors, counts: ReadCounts) -> Iterator[Iterable[str]]:
        if kind(file) == "jsonl":
            for text in read_jsonl(file, self.text_key, errors, counts):
                yield (text,)
        else:
            yield read_plain(file, errors, counts)

    def check_unchanged(self) -> None:
        """Raises DataError if a file was written to since this source was made."""
        for file, stamp in zip(self.files, self._stamps, strict=True):
            if self._stamp(file) != stamp:
                raise DataError(f"{file} changed while it was read; let its writer finish and run the command again")


def _expand(key: str, path: str) -> Iterator[Path]:
    where = Path(path).expanduser()
    if where.is_file():
        yield where
    elif where.is_dir():
        found = False
        for folder, folders, files in os.walk(where):
            folders[:] = [child for child in folders if not child.startswith(".")]
            for file in files:
                if not file.startswith("."):
                    found = True
                    yield Path(folder, file)
        if not found:
            raise DataError(f"{key}: {path} is a directory without files")
    elif glob.has_magic(path):
        matches = [file for file in map(Path, glob.glob(str(where), recursive=True)) if file.is_file()]  # noqa: PTH207
        if not matches:
            raise DataError(f"{key}: no file matches {path!r} (from {Path.cwd()})")
        yield from matches
    else:
        raise DataError(f"{key}: {path} does not exist (from {Path.cwd()})")
