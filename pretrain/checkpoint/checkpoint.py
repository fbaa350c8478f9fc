"""Sharded checkpoints that any number of ranks and any ZeRO stage can read.

`checkpoints/step-000001000/` holds a safetensors shard from each rank (the fragments it owns, one flat tensor
for each kind of state; in the first also the model's buffers) and `manifest.json`, which says what lies where. The
manifest is written last and removed first: a checkpoint exists only while its manifest does.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.errors import CheckpointError
from data_pipeline.sampling.data_state import DataState
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.rng import restore_rng_states
from pretrain.checkpoint.shard_file import hash_file
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine, Fragment
from pretrain.run.checkpoint_folder import complete

RNG = "rng/"
"""Before the name of a shard's tensors that hold the states of its rank's random number generators."""


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, path: Path) -> None:
        """Read the manifest, compare it with its own hash, and check that every shard is there in its full size.

        Raises:
            CheckpointError: names the file that is missing, unreadable, altered or of the wrong size.
        """
        self.path = path
        self.manifest = CheckpointManifest.load(path)
        self._files: dict[int, Any] = {}
        """Shards that are open, by their number."""

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare every shard (or every `parts`-th, from `part`) with its hash and its tensors with the manifest.

        Reads those files once, at the speed of the disk. They stay open, and can be read if a run removes them.

        Raises:
            CheckpointError: names the altered shard.
        """
        for number, shard in list(enumerate(self.manifest.shards))[part::parts]:
            file = self.path / shard.file
            try:
                found = hash_file(file)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
            if found != shard.xxh3_128:
                raise CheckpointError(f"{file}: altered: its hash is not the manifest's")
            self._check_tensors(number, self.manifest.buffers if number == 0 else {})

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
            file = self._open(ranks.rank)
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
        file = self._open(0)
        try:
            return {name: file.get_tensor(self.manifest.stored_name(name)) for name in self.manifest.buffers}
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
            for start, numel, shard, position in self._stored[target.name, state]:
                low, high = max(start, target.start), min(start + numel, target.start + target.numel)
                if low < high:
                    piece = self._slice(shard, state)[position + low - start : position + high - start]
                    values[low - target.start : high - target.start].copy_(piece)

    @cached_property
    def _stored(self) -> dict[tuple[str, str], list[tuple[int, int, int, int]]]:
        """Of each parameter and state the pieces: start, numel, number of the shard that holds it, position there."""
        stored: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
        for number, shard in enumerate(self.manifest.shards):
            ends: dict[str, int] = {}
            for name, start, numel in shard.fragments:
                for state in self.manifest.states[name]:
                    position = ends.get(state, 0)
                    stored.setdefault((name, state), []).append((start, numel, number, position))
                    ends[state] = position + numel
        return stored

    def _slice(self, number: int, state: str) -> Any:
        """A state's tensor in a shard."""
        try:
            return self._open(number).get_slice(state)
        except SafetensorError as error:
            file = self.path / self.manifest.shards[number].file
            raise CheckpointError(f"{file}: {state} is missing: {error}") from error

    def _compare(self, theirs: dict[str, list[int]], ours: dict[str, list[int]], kind: str) -> None:
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if odd:
            raise CheckpointError(
                f"{self.path}: of another model; first difference: {kind}{odd[0]} is {theirs.get(odd[0], 'missing')} "
                f"here, {ours.get(odd[0], 'missing')} in the run"
            )

    def _check_tensors(self, number: int, buffers: dict[str, list[int]]) -> None:
        shard = self.manifest.shards[number]
        wanted = {self.manifest.stored_name(name): shape for name, shape in buffers.items()}
        for name, _, numel in shard.fragments:
            for state in self.manifest.states[name]:
                wanted[state] = [wanted.get(state, [0])[0] + numel]
        file = self._open(number)
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
        for name, shape in wanted.items():
            if stored.get(name) != shape:
                raise CheckpointError(
                    f"{self.path / shard.file}: {name} is {stored.get(name, 'missing')}, the manifest says {shape}: "
                    "one of the two is damaged"
                )

    def _open(self, number: int) -> Any:
        """A shard, which is opened when it is first read: of thousands a rank needs a few."""
        if number not in self._files:
            file = self.path / self.manifest.shards[number].file
            try:
                self._files[number] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: damaged: {error}") from error
        return self._files[number]


def whole(path: Path) -> Checkpoint:
    """One that was compared with its hashes. Raises CheckpointError, as `Checkpoint` and `verify`."""
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    return checkpoint


def newest(root: Path, ranks: Ranks, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank; None when none has a manifest.

    Raises:
        CheckpointError: checkpoints are there, but every one is damaged.
    """
    paths = ranks.together(lambda: complete(root, warn), only_first=True)
    damage = []
    for path in paths:
        try:
            return _verified(path, ranks)
        except CheckpointError as error:
            damage.append(str(error))
            warn(f"damaged checkpoint passed over: {error}")
    if damage:
        raise CheckpointError(
            f"{root}: no checkpoint is whole:\n  " + "\n  ".join(damage) + "\n"
            "restore one from a copy, or start a new run with another run.name"
        )
    return None


def _verified(path: Path, ranks: Ranks) -> Checkpoint:
    # One rank looks at all shards for all: thousands that each look at thousands would stop a file server.
    checkpoint = ranks.together(lambda: Checkpoint(path), only_first=True)
    ranks.together(lambda: checkpoint.verify(ranks.rank, ranks.world_size))
    return checkpoint
