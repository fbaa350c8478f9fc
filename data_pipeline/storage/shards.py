"""Arrow IPC files of tokens: one column `tokens: list<uint16|int32>`, whose flat values are the training stream.

A row is a stretch of one document within one record batch; EOS as its last token says that the document ends there.
All batches of a shard but the last hold BATCH_TOKENS tokens, all shards of a stream (one source in one split) but the
last `shard_tokens`. Only a batch's first row can go on with a document from before; `documents` in the batch's metadata
counts the rows that do not, so document bounds survive the edges of batches and shards.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors
from data_pipeline.files.mapped import remember

BATCH_TOKENS = 2**20
_PAGE_BYTES = 4096


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id fits, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _schema(dtype: np.dtype, metadata: dict[str, str]) -> pa.Schema:
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema([pa.field("tokens", pa.list_(item), nullable=False)], metadata=metadata)


def _batch_hash(values: np.ndarray, offsets: np.ndarray) -> str:
    digest = xxhash.xxh3_64(values.view(np.uint8).data)
    digest.update(offsets.view(np.uint8).data)
    return digest.hexdigest()


@dataclass
class WrittenShard:
    """A finished, synced file and its figures."""

    path: Path
    tokens: int = 0
    documents: int = 0
    """Documents that start in this shard."""
    batches: int = 0
    bytes: int = 0
    xxh3_128: str = ""


def arrow(values: np.ndarray) -> pa.Array:
    """The same numbers, or truth values, [n]: where pandas is installed, `pa.array` takes 0.25 CPU s to import it."""
    if values.dtype == np.bool_:
        packed = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(packed)])
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


class _OpenShard:
    """An Arrow IPC file being written; counts and hashes as it goes, so that nothing is read back."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.written = WrittenShard(path)
        self._digest = xxhash.xxh3_128()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish or abort
        self._arrow = pa.ipc.new_file(pa.PythonFile(self, mode="w"), schema)

    def write(self, data: bytes) -> int:
        """What pyarrow calls with the file's bytes."""
        self._digest.update(data)
        self.written.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def add(self, schema: pa.Schema, values: np.ndarray, offsets: np.ndarray, documents: int) -> None:
        column = pa.ListArray.from_arrays(arrow(offsets), arrow(values), type=schema.field(0).type)
        facts = {"xxh3": _batch_hash(values, offsets), "tokens": str(len(values)), "documents": str(documents)}
        self._arrow.write_batch(pa.record_batch([column], schema=schema), custom_metadata=facts)
        self.written.tokens += len(values)
        self.written.documents += documents
        self.written.batches += 1

    def finish(self) -> WrittenShard:
        self._arrow.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.written.xxh3_128 = self._digest.hexdigest()
        return self.written

    def abort(self) -> None:
        with disk_errors(self.written.path):  # Closing writes what is buffered.
            self._file.close()


class ShardWriter:
    """Writes one token stream as `<folder>/<prefix>-000000.arrow` and so on. Close it with `finish`."""

    def __init__(
        self, folder: Path, prefix: str, shard_tokens: int, dtype: np.dtype, metadata: dict[str, str], first: int = 0
    ) -> None:
        """`metadata` goes into the schema of every shard; `first`: number of the first one."""
        self.shards: list[WrittenShard] = []
        self._first = first
        self._folder = folder
        self._prefix = prefix
        self._shard_tokens = shard_tokens
        self._schema = _schema(dtype, metadata)
        self._values = np.empty(min(BATCH_TOKENS, shard_tokens), dtype)
        self._filled = 0
        self._offsets = [0]
        self._documents = 0
        self._shard: _OpenShard | None = None

    def append(self, ids: np.ndarray, starts: bool) -> None:
        """Adds tokens, int [n]; `starts`: they begin a document. Raises DataError when the disk refuses."""
        if starts:
            self._end_row()
            self._documents += 1
        done = 0
        while done < len(ids):
            room = self._batch_tokens() - self._filled
            part = ids[done : done + room]
            self._values[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if len(part) == room:
                self._flush()

    def finish(self) -> list[WrittenShard]:
        """Writes what is left, syncs, and returns all shards in order. Raises DataError when the disk refuses."""
        self._flush()
        self._finish_shard()
        return self.shards

    def abort(self) -> None:
        """Closes the open file without completing it."""
        if self._shard is not None:
            self._shard.abort()

    def _batch_tokens(self) -> int:
        in_shard = self._shard.written.tokens if self._shard is not None else 0
        return min(BATCH_TOKENS, self._shard_tokens - in_shard)

    def _end_row(self) -> None:
        if self._filled > self._offsets[-1]:
            self._offsets.append(self._filled)

    def _flush(self) -> None:
        self._end_row()
        if not self._filled:
            return
        path = self._folder / f"{self._prefix}-{self._first + len(self.shards):06d}.arrow"
        with disk_errors(path):
            if self._shard is None:
                self._shard = _OpenShard(path, self._schema)
            offsets = np.array(self._offsets, np.int32)
            self._shard.add(self._schema, self._values[: self._filled], offsets, self._documents)
        self._filled, self._offsets, self._documents = 0, [0], 0
        if self._shard.written.tokens == self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            with disk_errors(self._shard.written.path):
                self.shards.append(self._shard.finish())
            self._shard = None


class Shard:
    """A finished shard, memory-mapped. Token views are zero copy and stay valid as long as they are referenced."""

    def __init__(self, path: Path, lease: BinaryIO | None = None) -> None:
        """`lease`: an open file that keeps it where it is, closed when this object goes.

        Raises DataError if the file is missing or its header or footer is damaged."""
        self.path = path
        self._lease = lease
        try:
            file = pa.memory_map(str(path))
            self._bytes = file.read_buffer()
            self._reader = pa.ipc.open_file(file)
        except FileNotFoundError:
            raise DataError(f"shard {path} is missing; restore it, or run `duet data build` again") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"shard {path}: damaged header or footer ({error}); {_MEND}") from None
        remember(self, path, self._bytes.size)
        self.num_batches: int = self._reader.num_record_batches
        self._views: list[np.ndarray | None] = [None] * self.num_batches

    def tokens(self, batch: int) -> np.ndarray:
        """All tokens of a record batch, uint16 or int32 [tokens], read-only."""
        view = self._views[batch]
        if view is None:
            view = self._views[batch] = self._batch(batch)[0]
        return view

    def read(self, batch: int, check: bool) -> tuple[np.ndarray, np.ndarray]:
        """All tokens of a record batch, and where documents begin among them, int32 [documents].

        `check`: compare it with its hash. Raises DataError if it is damaged.
        """
        values, offsets, recorded, documents = self._batch(batch)
        if check:
            self._compare(batch, values, offsets, recorded)
        return values, offsets[1 if documents < len(offsets) - 1 else 0 : -1]

    def rows(self, batch: int) -> np.ndarray:
        """Where the rows of a record batch begin and end among its tokens, int32 [rows + 1]."""
        return self._batch(batch)[1]

    def _batch(self, batch: int) -> tuple[np.ndarray, np.ndarray, bytes, int]:
        """Tokens, row bounds, recorded hash, and documents that start here."""
        try:
            record, facts = self._reader.get_batch_with_custom_metadata(batch)
            self._check_bounds(record)
            # Not `to_numpy`, which imports pandas: half a second of a rank's start.
            values_type = np.uint16 if record.schema.field(0).type.value_type == pa.uint16() else np.int32
            _, offsets, _, values = record.column(0).buffers()
            return (
                np.frombuffer(values, values_type, len(record.column(0).values)),
                np.frombuffer(offsets, np.int32, record.num_rows + 1),
                facts[b"xxh3"],
                int(facts[b"documents"]),
            )
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"shard {self.path}: batch {batch} cannot be read ({error}); {_MEND}") from None

    def continues(self, batch: int) -> bool:
        """Whether the first row of a record batch goes on with the document at the end of the batch before."""
        _, offsets, _, documents = self._batch(batch)
        return documents < len(offsets) - 1

    def _check_bounds(self, record: pa.RecordBatch) -> None:
        """Raises pa.ArrowInvalid where damaged metadata would make a view reach out of the file (a segfault)."""
        check_inside(record, self._bytes)
        column = record.column(0)
        if column.offset or column.offsets[0].as_py() != 0 or column.offsets[-1].as_py() != len(column.values):
            raise pa.ArrowInvalid("its offsets do not match its tokens")

    def _compare(self, batch: int, values: np.ndarray, offsets: np.ndarray, recorded: bytes) -> None:
        if _batch_hash(values, offsets).encode() != recorded:
            start = sum(len(self.tokens(before)) for before in range(batch))
            raise DataError(
                f"shard {self.path}: batch {batch} (tokens {start} to {start + len(values) - 1} of the shard) "
                f"does not match its hash{_zero_page(values)}; {_MEND}"
            )

    def check_batches(self) -> None:
        """Compares every batch with its hash. Raises DataError that names the first damaged one."""
        for batch in range(self.num_batches):
            self.read(batch, check=True)


def check_inside(record: pa.RecordBatch, file: pa.Buffer, column: int = 0) -> None:
    """Raises pa.ArrowInvalid where a column of a record batch reaches out of the mapped file."""
    record.validate()
    start, end = file.address, file.address + file.size
    for buffer in record.column(column).buffers():
        if buffer is not None and not start <= buffer.address <= buffer.address + buffer.size <= end:
            raise pa.ArrowInvalid("its metadata point out of the file")


_MEND = "restore the file from a copy, or run `duet data build --overwrite`"


def _zero_page(values: np.ndarray) -> str:
    at = values.tobytes().find(bytes(_PAGE_BYTES))
    return f": byte {at} of its tokens begins a page of zeros, as a lost write leaves" if at >= 0 else ""
