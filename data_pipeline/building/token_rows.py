"""Tokens of a unit of work on their way to the shards: Arrow IPC files of rows that need not fill anything.

A row is a stretch of a document within a chunk (a record batch). For a shuffle the rows of a chunk are sorted by the
key of their document, so that a range of keys is one stretch of each chunk.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors
from data_pipeline.files.mapped import remember
from data_pipeline.storage.shards import arrow, check_inside

CHUNK_TOKENS = 2**20
_MEND = "remove its folder and build again"
SORTED_CHUNK_TOKENS = 2**24  # Longer stretches to read for each range of keys.


class Chunk(NamedTuple):
    """Rows of a unit: views of the mapped file."""

    tokens: np.ndarray
    """uint16 or int32 [tokens]."""
    bounds: np.ndarray
    """Where rows begin and end among the tokens, int32 [rows + 1]."""
    starts: np.ndarray
    """Whether a row begins its document, bool [rows]."""
    keys: np.ndarray
    """Keys of the rows' documents, uint64 [rows]."""


class RowWriter:
    """Writes one file; there is none if there are no tokens."""

    def __init__(self, path: Path, dtype: np.dtype, by_key: bool) -> None:
        """`by_key`: sort the rows of each chunk."""
        self.chunks: list[int] = []
        """Tokens of each chunk that was written."""
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._by_key = by_key
        self._values = np.empty(SORTED_CHUNK_TOKENS if by_key else CHUNK_TOKENS, dtype)
        self._pending = False
        self._file: Any = None
        self._writer: Any = None
        self._clear()

    def _clear(self) -> None:
        self._filled = 0
        self._bounds, self._starts, self._keys = [0], list[bool](), list[int]()

    def append(self, ids: np.ndarray, starts: bool, key: int) -> None:
        """Adds tokens, int [n], to the document of `key`; `starts`: they are its first.

        Raises DataError when the disk refuses."""
        self._pending = self._pending or starts  # A document may begin with text that gives no token.
        done = 0
        while done < len(ids):
            part = ids[done : done + len(self._values) - self._filled]
            begins, self._pending = self._pending, False
            self._values[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if begins or not self._starts:
                self._bounds.append(self._filled)
                self._starts.append(begins)
                self._keys.append(key)
            else:
                self._bounds[-1] = self._filled
            if self._filled == len(self._values):
                self._flush()

    def finish(self) -> None:
        """Syncs the file and gives it its name. Raises DataError when the disk refuses."""
        self._flush()
        if self._writer is not None:
            with disk_errors(self._path):
                self._writer.close()
                self._writer = None
                self._file.close()
                descriptor = os.open(self._temporary, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
                os.replace(self._temporary, self._path)

    def abort(self) -> None:
        """Removes what is not finished."""
        if self._writer is not None:
            with disk_errors(self._path):
                self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._filled:
            return
        values, bounds = self._values[: self._filled], np.array(self._bounds, np.int32)
        starts, keys = np.array(self._starts), np.array(self._keys, np.uint64)
        if self._by_key:
            order = np.argsort(keys, kind="stable")
            values = np.concatenate([values[bounds[row] : bounds[row + 1]] for row in order])
            bounds = np.concatenate([np.zeros(1, np.int32), np.cumsum(np.diff(bounds)[order], dtype=np.int32)])
            starts, keys = starts[order], keys[order]
        tokens = pa.ListArray.from_arrays(arrow(bounds), arrow(values))
        batch = pa.record_batch({"tokens": tokens, "starts": arrow(starts), "key": arrow(keys)})
        with disk_errors(self._path):
            if self._writer is None:
                self._file = pa.OSFile(str(self._temporary), "wb")
                self._writer = pa.ipc.new_file(self._file, batch.schema)
            self._writer.write_batch(batch, custom_metadata={"xxh3": _hash(values, bounds, starts, keys)})
        self.chunks.append(self._filled)
        self._clear()


def _hash(*arrays: np.ndarray) -> str:
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


class RowFile:
    """A finished file of rows, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if the file is missing or cut off."""
        self._path = path
        try:
            file = pa.memory_map(str(path), "r")
            self._bytes = file.read_buffer()
            self._reader = pa.ipc.open_file(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); {_MEND}") from None
        remember(self, path, self._bytes.size)

    def __len__(self) -> int:
        """Number of chunks."""
        return self._reader.num_record_batches

    def chunk(self, number: int, check: bool = True) -> Chunk:
        """A chunk; `check`: compare it with its hash. Raises DataError if it is damaged."""
        try:
            batch, facts = self._reader.get_batch_with_custom_metadata(number)
            for column in range(batch.num_columns):
                check_inside(batch, self._bytes, column)
            tokens, starts, keys = batch.columns
            rows, (_, bounds, _, values) = batch.num_rows, tokens.buffers()
            bits = np.frombuffer(starts.buffers()[1], np.uint8)
            chunk = Chunk(  # by hand: `to_numpy` imports pandas, as `pa.array` does
                np.frombuffer(values, str(tokens.type.value_type), len(tokens.values)),
                np.frombuffer(bounds, np.int32, rows + 1),
                np.unpackbits(bits, count=rows, bitorder="little").view(np.bool_),
                np.frombuffer(keys.buffers()[1], np.uint64, rows),
            )
            damaged = check and facts[b"xxh3"].decode() != _hash(*chunk)
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{self._path}: chunk {number} cannot be read ({error}); {_MEND}") from None
        if damaged:
            raise DataError(f"{self._path}: chunk {number} does not match its hash; {_MEND}")
        return chunk
