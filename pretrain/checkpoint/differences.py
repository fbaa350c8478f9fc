"""What differs between two checkpoints."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.engine.engine import CHUNK, Fragment

METADATA = ("step", "optimizer_steps", "world_size", "zero_stage", "validation_loss", "state")


@dataclass(frozen=True)
class Difference:
    """One state of one parameter, or a buffer."""

    name: str
    state: str
    largest: float
    """max |a - b|."""
    relative: float
    """‖a - b‖ / ‖a‖; infinite when only a is 0."""


def metadata_differences(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """What the manifests say differently, by dotted key; None where one says nothing."""
    one, other = (dict(_flat(c.manifest.model_dump(mode="json", include=set(METADATA)))) for c in (a, b))
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def shape_differences(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[str, str]]:
    """Parameters that are not in both with the same shape and the same states, and buffers with another shape."""

    def described(checkpoint: Checkpoint, name: str) -> str:
        manifest = checkpoint.manifest
        if name in manifest.buffers:
            return f"{manifest.buffers[name]} buffer"
        shape = manifest.shapes.get(name)
        return "missing" if shape is None else f"{shape} {' '.join(manifest.states[name])}"

    names = sorted({name for c in (a, b) for name in (*c.manifest.shapes, *c.manifest.buffers)})
    pairs = {name: (described(a, name), described(b, name)) for name in names}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def tensor_differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Every state of every parameter, and every buffer, that both have in the same shape, also where nothing differs.

    Reads CHUNK elements of a parameter at a time: memory does not grow with the checkpoints.
    """
    for name, shape in a.manifest.shapes.items():
        if b.manifest.shapes.get(name) == shape:
            for state in a.manifest.states[name]:
                if state in b.manifest.states[name]:
                    yield _difference(name, state, _parts(a, b, name, state, math.prod(shape)))
    ours, theirs = a.buffers(), b.buffers()
    for name, shape in a.manifest.buffers.items():
        if b.manifest.buffers.get(name) == shape:
            yield _difference(name, "buffer", [(ours[name].double(), theirs[name].double())])


def _parts(a: Checkpoint, b: Checkpoint, name: str, state: str, numel: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, numel, CHUNK):
        size = min(CHUNK, numel - start)
        one, other = torch.empty(size), torch.empty(size)
        a.read(Fragment(name, start, size, {state: one}))
        b.read(Fragment(name, start, size, {state: other}))
        yield one, other


def _difference(name: str, state: str, parts: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    largest = change = norm = 0.0
    for one, other in parts:
        norm += float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2
        one -= other
        largest = max(largest, float(one.abs().max()))
        change += float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2
    relative = math.sqrt(change / norm) if norm else math.inf if change else 0.0
    return Difference(name, state, largest, relative)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
