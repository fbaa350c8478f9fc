"""Sharded checkpoints that any number of ranks and any ZeRO stage can read.

`checkpoints/step-000001000/` holds a safetensors shard from each rank (the fragments it owns, one flat tensor
for each kind of state; in the first also the model's buffers) and `manifest.json`, which says what lies where. The
manifest is written last and removed first: a checkpoint exists only while its manifest does.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.atomic import sync_folder
from data_pipeline.errors import CheckpointError
from data_pipeline.state import DataState
from pretrain.distributed import Ranks
from pretrain.engine import ADAM_STATES, Engine, Fragment
from pretrain.rng import restore_rng_states
from pretrain.shard import Shard, hash_file

FORMAT = 4
"""The second had no buffers. Up to the third, labels weighed alike within a micro-batch only."""
OLDEST_FORMAT = 1
"""Which had AdamW only and did not name the states."""

RNG = "rng/"
"""Before the name of a shard's tensors that hold the states of its rank's random number generators."""
BUFFER = "buffer/"
"""Before the name of the first shard's tensors that hold the model's buffers."""


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What makes a directory a checkpoint."""

    format: int = FORMAT
    step: int
    optimizer_steps: int
    """Updates AdamW has applied; less than `step` by the skipped ones."""
    world_size: int
    zero_stage: int
    shapes: dict[str, list[int]]
    states: dict[str, tuple[str, ...]]
    """What each parameter is made of: fp32, and what its optimizer keeps."""
    buffers: dict[str, list[int]] = {}
    """Shapes of the model's buffers."""
    shards: list[Shard]
    state: dict[str, Any]
    """Everything that is not a tensor: data position, fingerprint, tokenizer, configuration, attempt, commit."""
    validation_loss: float | None = None
    """Of this very step, in nats a token, when there was a validation."""
    saved: float | None = None
    """Seconds since the epoch, at the copy."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_states(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("format") == OLDEST_FORMAT and isinstance(raw.get("shapes"), dict):
            return raw | {"states": dict.fromkeys(raw["shapes"], ADAM_STATES)}
        return raw


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, path: Path) -> None:
        """Read the manifest and check that every shard is there in its full size.

        Raises:
            CheckpointError: names the file that is missing, unreadable or of the wrong size.
        """
        self.path = path
        file = path / "manifest.json"
        try:
            raw = json.loads(file.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no complete checkpoint (no manifest.json)") from None
        except ValueError as error:
            raise CheckpointError(f"{file}: damaged, not JSON ({error})") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if found not in range(OLDEST_FORMAT, FORMAT + 1):
            raise CheckpointError(
                f"{file}: format {found} is not known here; this version reads {OLDEST_FORMAT} to {FORMAT}"
            )
        try:
            self.manifest = Manifest.model_validate(raw)
        except ValidationError as error:
            raise CheckpointError(f"{file}: damaged: {error}") from None
        for shard in self.manifest.shards:
            shard_file = path / shard.file
            size = shard_file.stat().st_size if shard_file.is_file() else None
            if size is None:
                raise CheckpointError(f"{shard_file}: missing")
            if size != shard.bytes:
                raise CheckpointError(
                    f"{shard_file}: {size} bytes, the manifest says {shard.bytes}: truncated or altered"
                )
        self._check_coverage()

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the hash of every shard (or of every `parts`-th, from `part`) with the manifest.

        Raises:
            CheckpointError: names the altered shard.
        """
        for shard in self.manifest.shards[part::parts]:
            if hash_file(self.path / shard.file) != shard.xxh3_128:
                raise CheckpointError(f"{self.path / shard.file}: altered: its hash is not the manifest's")

    def data_state(self, seed: int) -> DataState:
        """Where the data stood.

        Raises:
            CheckpointError: the manifest does not say, or the run had another seed.
        """
        try:
            data = DataState.model_validate(self.manifest.state["data"])
        except (KeyError, ValidationError) as error:
            raise CheckpointError(f"{self.path}: the manifest does not say where the data stood: {error!r}") from None
        if data.seed != seed:
            raise CheckpointError(f"{self.path}: of a run with run.seed={data.seed}; this one has run.seed={seed}")
        return data

    def load(self, engine: Engine) -> None:
        """Copy parameters, moments and buffers into an engine of any stage and number of ranks, bit for bit.

        But for the states in `Engine.types`, which are converted when their type is another one.

        Raises:
            CheckpointError: the checkpoint is of another model; nothing was changed then.
        """
        self.check_shapes(engine.shapes)
        self.check_buffers(engine.buffers.tensors)
        if self.manifest.states != engine.states:
            wanted, stored = engine.states, self.manifest.states
            name = next(name for name in sorted(wanted) if wanted[name] != stored.get(name))
            raise CheckpointError(
                f"{self.path}: of another optimizer; first difference: {name} has {', '.join(stored.get(name, ()))} "
                f"here, {', '.join(wanted[name])} in the run"
            )
        for fragment in engine.fragments():
            self.read(fragment)
        engine.buffers.load(self.buffers())
        engine.adopt_fragments(self.manifest.optimizer_steps)

    def restore_rng(self, ranks: Ranks) -> None:
        """Set the random number generators as they were, if this is the same number of ranks."""
        if self.manifest.world_size == ranks.world_size:
            file = self._open(self.manifest.shards[ranks.rank])
            names = [name for name in file.keys() if name.startswith(RNG)]  # noqa: SIM118  # not a dict
            if names:  # there were none in the first format
                restore_rng_states({name.removeprefix(RNG): file.get_tensor(name) for name in names})

    def weights(self) -> dict[str, Tensor]:
        """The fp32 parameters, whole, by name."""
        tensors = {name: torch.empty(shape) for name, shape in self.manifest.shapes.items()}
        for name, tensor in tensors.items():
            self.read(Fragment(name, 0, tensor.numel(), {"fp32": tensor.view(-1)}))
        return tensors

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers, by name.

        Raises:
            CheckpointError: the first shard does not hold them.
        """
        if not self.manifest.buffers:
            return {}
        file = self._open(self.manifest.shards[0])
        try:
            return {name: file.get_tensor(BUFFER + name) for name in self.manifest.buffers}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / self.manifest.shards[0].file}: damaged: {error}") from error

    def check_shapes(self, wanted: dict[str, list[int]]) -> None:
        """Raises CheckpointError unless the parameters of a model are those of the checkpoint."""
        self._compare(self.manifest.shapes, wanted, "")

    def check_buffers(self, wanted: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless the buffers of a model are those of the checkpoint."""
        self._compare(self.manifest.buffers, {name: list(values.shape) for name, values in wanted.items()}, "buffer ")

    def read(self, target: Fragment) -> None:
        """Fill every state of a fragment from the stored ones that overlap it."""
        for state, values in target.states.items():
            for start, numel, source, position in self._stored[target.name, state]:
                low, high = max(start, target.start), min(start + numel, target.start + target.numel)
                if low < high:
                    piece = source[position + low - start : position + high - start]
                    values[low - target.start : high - target.start].copy_(piece)

    @cached_property
    def _stored(self) -> dict[tuple[str, str], list[tuple[int, int, Any, int]]]:
        """Of each parameter and state the pieces: start, numel, the tensor that holds it, position there."""
        stored: dict[tuple[str, str], list[tuple[int, int, Any, int]]] = {}
        for shard in self.manifest.shards:
            file = self._open(shard)
            slices = {state: file.get_slice(state) for state in file.keys()}  # noqa: SIM118  # not a dict
            ends = dict.fromkeys(slices, 0)
            for name, start, numel in shard.fragments:
                for state in self.manifest.states[name]:
                    stored.setdefault((name, state), []).append((start, numel, slices[state], ends[state]))
                    ends[state] += numel
        return stored

    def _compare(self, theirs: dict[str, list[int]], ours: dict[str, list[int]], kind: str) -> None:
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if odd:
            raise CheckpointError(
                f"{self.path}: of another model; first difference: {kind}{odd[0]} is {theirs.get(odd[0], 'missing')} "
                f"here, {ours.get(odd[0], 'missing')} in the run"
            )

    def _open(self, shard: Shard) -> Any:
        try:
            return safe_open(self.path / shard.file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / shard.file}: damaged: {error}") from error

    def _check_coverage(self) -> None:
        held: dict[str, list[tuple[int, int]]] = {}
        for shard in self.manifest.shards:
            for name, start, numel in shard.fragments:
                held.setdefault(name, []).append((start, numel))
        for name, shape in self.manifest.shapes.items():
            end = 0
            for start, numel in sorted(held.get(name, [])):
                if start != end:
                    break
                end += numel
            if end != math.prod(shape):
                raise CheckpointError(f"{self.path}: incomplete: {name} is not covered from element {end}")


def complete(root: Path) -> list[Path]:
    """Directories with a manifest, newest step first."""
    return sorted((m.parent for m in root.glob("step-*/manifest.json")), key=step_of, reverse=True)


def newest(root: Path, ranks: Ranks, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank; None when none has a manifest.

    Raises:
        CheckpointError: checkpoints are there, but every one is damaged.
    """
    paths = ranks.broadcast(complete(root) if ranks.is_first else None)
    damage = []
    for path in paths:
        try:
            return ranks.together(lambda path=path: _verified(path, ranks))  # type: ignore[misc]
        except CheckpointError as error:
            damage.append(str(error))
            warn(f"damaged checkpoint passed over: {error}")
    if damage:
        raise CheckpointError(
            f"{root}: no checkpoint is whole:\n  " + "\n  ".join(damage) + "\n"
            "restore one from a copy, or start a new run with another run.name"
        )
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint: first what makes it one, then the rest."""
    (path / "manifest.json").unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def step_path(root: Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return root / f"step-{step:09d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(path.name.removeprefix("step-"))


def _verified(path: Path, ranks: Ranks) -> Checkpoint:
    checkpoint = Checkpoint(path)
    checkpoint.verify(ranks.rank, ranks.world_size)
    return checkpoint
