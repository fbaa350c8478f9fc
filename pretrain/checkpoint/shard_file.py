"""One rank's file of a checkpoint: safetensors, hashed while it is written.

The format is public (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, a header in
JSON that gives each tensor's type, shape and place, the tensors.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_pipeline.errors import CheckpointError

BLOCK = 8 * 2**20
"""Bytes that are written, or read, at once."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    file: Path, tensors: dict[str, Tensor], abandoned: Event, metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write contiguous host tensors into a new file, flushed to disk. One that could not be written whole is removed.

    The same content gives the same bytes, which safetensors' own writer does not promise: it shuffles `metadata`.

    Returns:
        bytes and hash of the file.

    Raises:
        CheckpointError: the disk refuses, `abandoned` was set in the meantime, or there is such a file: this run has
            stood still, and another start owns the folder by now.
    """
    digest = xxhash.xxh3_128()
    try:
        file.touch(exist_ok=False)
    except OSError as error:
        raise write_error(file, error) from error
    try:
        with open(file, "wb") as written:
            for block in _blocks(tensors, metadata):
                if abandoned.is_set():
                    raise CheckpointError(f"{file}: abandoned, since the run ends")
                written.write(block)
                digest.update(block)
            written.flush()
            os.fsync(written.fileno())
            return written.tell(), digest.hexdigest()
    except OSError as error:
        file.unlink(missing_ok=True)  # it fills the disk
        raise write_error(file, error) from error


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What a disk that is full or refuses means to the user."""
    return CheckpointError(
        f"{path}: the checkpoint could not be written: {error}; older checkpoints are untouched; "
        "free space and start the same command again"
    )


def hash_file(path: Path) -> str:
    """As in `CheckpointShard.xxh3_128` (pretrain/checkpoint/manifest.py)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _blocks(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        content = tensor.flatten().view(torch.uint8).numpy().data
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]
