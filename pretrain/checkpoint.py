"""Sharded checkpoints that any number of ranks and any ZeRO stage can read.

`checkpoints/step-000001000/` holds a safetensors shard from each rank (the fragments it owns, one flat tensor
for each kind of state) and `manifest.json`, which says what lies where. The manifest is written last and removed first:
a checkpoint exists only while its manifest does.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from pydantic import BaseModel, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.atomic import sync_folder, write_atomic
from data_pipeline.errors import CheckpointError
from data_pipeline.state import DataState
from pretrain.distributed import Ranks
from pretrain.engine import ADAM_STATES, Engine, Fragment

FORMAT = 2
OLDEST_FORMAT = 1
"""Which had AdamW only and did not name the states."""

T = TypeVar("T")


class Shard(BaseModel, extra="forbid", frozen=True):
    """One rank's file and the fragments in it, in order: (parameter, start, numel)."""

    file: str
    bytes: int
    xxh3_128: str
    fragments: list[tuple[str, int, int]]


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
    shards: list[Shard]
    state: dict[str, Any]
    """Everything that is not a tensor: data position, fingerprint, tokenizer, attempt."""

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
            if _hash(self.path / shard.file) != shard.xxh3_128:
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
        """Copy parameters and moments into an engine of any stage and number of ranks, bit for bit.

        Raises:
            CheckpointError: the checkpoint is of another model; nothing was changed then.
        """
        if self.manifest.shapes != engine.shapes:
            ours, theirs = engine.shapes, self.manifest.shapes
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise CheckpointError(
                f"{self.path}: of another model; first difference: {odd[0]} is {theirs.get(odd[0], 'missing')} here, "
                f"{ours.get(odd[0], 'missing')} in the run"
            )
        if self.manifest.states != engine.states:
            wanted, stored = engine.states, self.manifest.states
            name = next(name for name in sorted(wanted) if wanted[name] != stored.get(name))
            raise CheckpointError(
                f"{self.path}: of another optimizer; first difference: {name} has {', '.join(stored.get(name, ()))} "
                f"here, {', '.join(wanted[name])} in the run"
            )
        self._copy(engine.fragments())
        engine.adopt_fragments(self.manifest.optimizer_steps)

    def weights(self) -> dict[str, Tensor]:
        """The fp32 parameters, whole, by name."""
        tensors = {name: torch.empty(shape) for name, shape in self.manifest.shapes.items()}
        whole = [Fragment(name, 0, t.numel(), {"fp32": t.view(-1)}) for name, t in tensors.items()]
        self._copy(whole)
        return tensors

    def _copy(self, targets: list[Fragment]) -> None:
        """Fill every state of every target from the stored fragments that overlap it."""
        stored: dict[tuple[str, str], list[tuple[int, int, Any, int]]] = {}
        for shard in self.manifest.shards:
            file = safe_open(self.path / shard.file, framework="pt")
            slices = {state: file.get_slice(state) for state in file.keys()}  # noqa: SIM118  # not a dict
            ends = dict.fromkeys(slices, 0)
            for name, start, numel in shard.fragments:
                for state in self.manifest.states[name]:
                    stored.setdefault((name, state), []).append((start, numel, slices[state], ends[state]))
                    ends[state] += numel
        for target in targets:
            for state, values in target.states.items():
                for start, numel, source, position in stored[target.name, state]:
                    low, high = max(start, target.start), min(start + numel, target.start + target.numel)
                    if low < high:
                        piece = source[position + low - start : position + high - start]
                        values[low - target.start : high - target.start].copy_(piece)

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


def save(
    engine: Engine, root: Path, step: int, state: dict[str, Any], ranks: Ranks, still_ours: Callable[[], None]
) -> Path:
    """Write a checkpoint with all ranks; it exists when this returns, and not before.

    `still_ours` raises when the run folder was taken over; it is called just before the manifest is written.

    Raises:
        CheckpointError: on every rank, when one could not write; older checkpoints are untouched.
    """
    path = step_path(root, step)

    def prepare() -> None:
        if path.exists():  # left by a crash, or damaged
            remove(path)
        path.mkdir(parents=True)

    def write_shard() -> Shard:
        return _write_shard(path / f"shard-{ranks.rank:05d}.safetensors", engine.owned_fragments())

    ranks.together(_disk_errors(path, prepare), only_first=True)
    shards = ranks.gather(ranks.together(_disk_errors(path, write_shard)))
    manifest = Manifest(
        step=step,
        optimizer_steps=engine.optimizer_steps,
        world_size=ranks.world_size,
        zero_stage=engine.stage,
        shapes=engine.shapes,
        states=engine.states,
        shards=shards,
        state=state,
    )

    def publish() -> None:
        still_ours()
        sync_folder(path)
        write_atomic(path / "manifest.json", manifest.model_dump_json(indent=1))
        sync_folder(root)

    ranks.together(_disk_errors(path, publish), only_first=True)
    return path


def complete(root: Path) -> list[Path]:
    """Directories with a manifest, newest step first."""
    return sorted((m.parent for m in root.glob("step-*/manifest.json")), key=_step_of, reverse=True)


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


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves of earlier steps left."""
    kept = complete(root)[:keep]
    for path in root.glob("step-*"):
        if path not in kept and _step_of(path) <= _step_of(kept[0]):
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint: first what makes it one, then the rest."""
    (path / "manifest.json").unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def step_path(root: Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return root / f"step-{step:09d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _verified(path: Path, ranks: Ranks) -> Checkpoint:
    checkpoint = Checkpoint(path)
    checkpoint.verify(ranks.rank, ranks.world_size)
    return checkpoint


def _write_shard(file: Path, fragments: list[Fragment]) -> Shard:
    kinds = sorted({state for fragment in fragments for state in fragment.states})
    flat = {state: torch.cat([f.states[state].cpu() for f in fragments if state in f.states]) for state in kinds}
    save_file(flat, file)
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    return Shard(
        file=file.name,
        bytes=file.stat().st_size,
        xxh3_128=_hash(file),
        fragments=[(f.name, f.start, f.numel) for f in fragments],
    )


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def _disk_errors(path: Path, work: Callable[[], T]) -> Callable[[], T]:
    """Turn a disk that is full or read-only into an error that names the checkpoint."""

    def guarded() -> T:
        try:
            return work()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: the checkpoint could not be written: {error}; older checkpoints are untouched; "
                "free space and start the same command again"
            ) from error

    return guarded
