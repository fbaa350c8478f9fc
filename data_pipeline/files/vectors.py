"""Vectors as files for others: .npy, .arrow, or .jsonl."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.errors import ConfigError
from data_pipeline.files.atomic import check_writable, disk_errors, write_atomic

ENDINGS = (".npy", ".arrow", ".jsonl")
COLUMN = "vector"


def check_place(path: Path) -> None:
    """Before vectors are made, whether they can be written.

    Raises:
        ConfigError: the name of the file does not say how.
        DataError: the disk refuses.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path}: vectors are written into a file whose name ends in {', '.join(ENDINGS)}")
    check_writable(path)


def write_vectors(path: Path, vectors: np.ndarray) -> None:
    """Vectors float32 [N, C] in their order: an array, a column `vector`, or an object with `vector` on each line.

    Raises:
        ConfigError, DataError: as `check_place`.
    """
    check_place(path)
    with disk_errors(path):
        write_atomic(path, _CONTENT[path.suffix](vectors))


def _npy(vectors: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()


def _arrow(vectors: np.ndarray) -> bytes:
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table, sink = pa.table({COLUMN: column}), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _jsonl(vectors: np.ndarray) -> str:
    return "".join(json.dumps({COLUMN: vector.tolist()}) + "\n" for vector in vectors)


_CONTENT: dict[str, Callable[[np.ndarray], bytes | str]] = {".npy": _npy, ".arrow": _arrow, ".jsonl": _jsonl}
