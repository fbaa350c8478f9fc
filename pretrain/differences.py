"""What differs between two checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.checkpoint import Checkpoint
from pretrain.engine import CHUNK, Fragment

METADATA = ("step", "optimizer_steps", "world_size", "zero_stage", "validation_loss", "state")


@dataclass(frozen=True)
class Difference:
    """One state of one parameter."""

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
    """Parameters that are not in both with the same shape and the same states."""

    def described(checkpoint: Checkpoint, name: str) -> str:
        shape = checkpoint.manifest.shapes.get(name)
        return "missing" if shape is None else f"{shape} {' '.join(checkpoint.manifest.states[name])}"

    names = sorted(a.manifest.shapes.keys() | b.manifest.shapes.keys())
    pairs = {name: (described(a, name), described(b, name)) for name in names}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def tensor_differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Every state of every parameter that both have in the same shape, also where nothing differs.

    Reads CHUNK elements at a time: memory does not grow with the checkpoints.
    """
    for name, shape in a.manifest.shapes.items():
        if b.manifest.shapes.get(name) == shape:
            for state in a.manifest.states[name]:
                if state in b.manifest.states[name]:
                    yield _difference(a, b, name, state, math.prod(shape))


def _difference(a: Checkpoint, b: Checkpoint, name: str, state: str, numel: int) -> Difference:
    largest = change = norm = 0.0
    for start in range(0, numel, CHUNK):
        size = min(CHUNK, numel - start)
        one, other = torch.empty(size), torch.empty(size)
        a.read(Fragment(name, start, size, {state: one}))
        b.read(Fragment(name, start, size, {state: other}))
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
