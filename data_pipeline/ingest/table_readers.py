"""Documents of Parquet and Arrow files: one a row, read a few rows at a time."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import open_binary
from data_pipeline.files.formats import packing
from data_pipeline.ingest.readers import MAX_LINE_BYTES, Document, Errors, ReadCounts, decode, document_of

_ROWS = 128  # Rows that are held in memory at once.
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""The types of text, and of the same bytes without a claim that they are UTF-8."""
_FILE_MAGIC = b"ARROW1\0\0"


def parquet_groups(name: str) -> list[int]:
    """Bytes of each row group. Raises DataError if it is no Parquet file."""
    with _parquet(name) as file:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


@contextmanager
def _parquet(name: str) -> Iterator[pq.ParquetFile]:
    if packing(name):
        raise DataError(f"{name}: Parquet is packed inside and cannot be read packed; unpack the file")
    with open_binary(name) as (file, _), _faults(name, "Parquet"):
        # Pages are read as they come; a row group may be larger than memory.
        yield pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)


@contextmanager
def _faults(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        why = str(error) or "it speaks of more bytes than memory holds"
        raise DataError(f"{name}: cannot be read as {kind}: {why}; fetch the file again") from error


class Columns(NamedTuple):
    """What is wanted of a table, and how errors name its rows."""

    name: str
    texts: tuple[str, ...]
    """The text; or source and target."""
    others: tuple[str, ...] | None
    """Columns that a filter looks at; None: all."""
    errors: Errors


def read_parquet(columns: Columns, counts: ReadCounts, begin: int = 0, end: int | None = None) -> Iterator[Document]:
    """The rows of row groups `begin` to `end`. Raises DataError that names the file, and the row where it can."""
    with _parquet(columns.name) as file:
        wanted = _wanted(columns, file.schema_arrow)
        groups = range(begin, file.num_row_groups if end is None else end)
        before = sum(file.metadata.row_group(group).num_rows for group in range(begin))
        base, done = counts.input_bytes, 0
        for group in groups:
            with _faults(columns.name, "Parquet"):
                batches = file.iter_batches(_ROWS, row_groups=[group], columns=wanted)
                for batch in batches:
                    yield from _rows(batch, columns, before, done, counts)
                    done += batch.num_rows
            size = sum(
                file.metadata.row_group(group).column(c).total_compressed_size for c in range(file.metadata.num_columns)
            )
            counts.input_bytes = base = base + size


def read_arrow(columns: Columns, counts: ReadCounts) -> Iterator[Document]:
    """The rows of an Arrow IPC file or stream, which may be packed. Raises DataError as read_parquet does."""
    with open_binary(columns.name) as (file, raw), _faults(columns.name, "Arrow IPC"):
        base, done = counts.input_bytes, 0
        schema, batches = _batches(io.BufferedReader(file, 2**20), bool(packing(columns.name)))  # type: ignore[arg-type]
        wanted = _wanted(columns, schema)
        for batch in batches:
            counts.input_bytes = base + raw.tell()
            for start in range(0, batch.num_rows, _ROWS):
                yield from _rows(batch.select(wanted).slice(start, _ROWS), columns, 0, done, counts)
                done += min(_ROWS, batch.num_rows - start)


def _batches(file: io.BufferedReader, packed: bool) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if file.peek(len(_FILE_MAGIC))[: len(_FILE_MAGIC)] != _FILE_MAGIC:
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)
    if packed:
        # A file is this magic, a stream, and a footer, which reading from the front does not need.
        file.read(len(_FILE_MAGIC))
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)
    # The footer tells whether the file is whole.
    opened = pa.ipc.open_file(file)
    return opened.schema, map(opened.get_batch, range(opened.num_record_batches))


def _wanted(columns: Columns, schema: pa.Schema) -> list[str]:
    others = tuple(schema.names) if columns.others is None else columns.others
    for key in (*columns.texts, *others):
        if key not in schema.names:
            names = ", ".join(map(repr, schema.names)) or "none"
            raise DataError(
                f"{columns.name} has no column {key!r}; its columns: {names}. Name one of them in the source"
            )
        if schema.names.count(key) > 1:
            raise DataError(
                f"{columns.name} has {schema.names.count(key)} columns {key!r}, and nothing says which is meant: "
                "write each with a name of its own"
            )
    for text in columns.texts:
        _check_strings(columns.name, text, schema)
    return list(dict.fromkeys((*columns.texts, *others)))


def _check_strings(name: str, text: str, schema: pa.Schema) -> None:
    kind = schema.field(text).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (kind in _BYTES or pa.types.is_null(kind)):
        strings = [field.name for field in schema if field.type in _BYTES]
        raise DataError(
            f"{name}: column {text!r} is {kind}, not string; columns of strings: "
            f"{', '.join(map(repr, strings)) or 'none'}. Set text_key of the source to one of them"
        )


def _rows(batch: pa.RecordBatch, columns: Columns, before: int, done: int, counts: ReadCounts) -> Iterator[Document]:
    """`before`: rows of the file before reading began; `done`: rows read since then."""
    values = [_as_bytes(batch.column(text)) for text in columns.texts]
    others = {key: _values(batch, columns, key) for key in _wanted(columns, batch.schema) if key not in columns.texts}
    for row in range(batch.num_rows):
        where = f"{columns.name}, row {before + done + row + 1}"
        record: dict[str, Any] = {key: column[row] for key, column in others.items()}
        for key, column in zip(columns.texts, values, strict=True):
            value = column[row] or b""
            if len(value) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where} has a text of {len(value)} bytes, more than {MAX_LINE_BYTES}: split it, or store it as a "
                    "plain-text file (these have no limit)"
                )
            record[key] = decode(value, True, columns.errors, where, 0, counts)[0]
        texts = [record[key] for key in columns.texts]
        yield document_of(before + done + row, done + row + 1, texts, record)


def _values(batch: pa.RecordBatch, columns: Columns, key: str) -> list[Any]:
    try:
        batch.column(key).validate(full=True)
        return batch.column(key).to_pylist()
    except (ValueError, LookupError, OverflowError) as error:
        raise DataError(
            f"{columns.name}: column {key!r} ({batch.schema.field(key).type}), which a filter sees, holds what Python "
            f"cannot: {error}; write the file without it, or as strings"
        ) from error


def _as_bytes(texts: pa.Array) -> list[bytes | None]:
    """So that text that is not UTF-8 is met by the same rule as everywhere. Raises ArrowInvalid for damaged offsets,
    which would lead out of the file."""
    if pa.types.is_null(texts.type):
        return texts.to_pylist()
    indices = texts.indices if pa.types.is_dictionary(texts.type) else None
    values = texts if indices is None else texts.dictionary
    values = values.view(_BYTES[values.type])
    values.validate(full=True)
    return (values if indices is None else values.take(indices)).to_pylist()


def whole_spans(sizes: list[int], limit: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, bytes) of runs of row groups that hold at least `limit` bytes each, but for the last."""
    begin = size = 0
    for number, group in enumerate(sizes):
        size += group
        if size >= limit or number == len(sizes) - 1:
            yield begin, number + 1, size
            begin, size = number + 1, 0
