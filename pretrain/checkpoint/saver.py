"""Saving behind the training: one thread of each rank copies and writes; an update waits until the copy is made.

A save has two parts. First each rank's thread makes the engine's snapshot and writes it, its shard; then rank 0's
thread publishes: it writes the manifest, which makes the directory a checkpoint, and lets old ones go. The threads
never touch the process group. That every rank is done with its part is agreed on by the main threads, at the edge of a
step, with a flag that travels with the request to stop. So collectives keep their order, a rank whose disk is full
still can say so, and nothing depends on how soon one node sees the other's files.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from data_pipeline.errors import CheckpointError
from data_pipeline.files.atomic import sync_folder, write_atomic
from pretrain.checkpoint.checkpoint import RNG
from pretrain.checkpoint.manifest import BUFFER, CheckpointManifest, CheckpointShard
from pretrain.checkpoint.rng import rng_states
from pretrain.checkpoint.shard_file import write_error, write_tensors
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.run.checkpoint_folder import FORMAT, MANIFEST, is_checkpoint, make_room, step_path


@dataclass(frozen=True)
class Published:
    """A checkpoint that is complete."""

    step: int
    path: Path
    blocked: float
    """Seconds that training has waited for it."""
    seconds: float
    """From the beginning of the save on."""


@dataclass
class _Save:
    """The save in flight."""

    path: Path
    content: dict[str, Any]
    """Of the manifest, but for the shards."""
    work: Future[Any]
    """Of this rank's thread: its shard, later the publication."""
    since: float
    """When it began, by `time.perf_counter()`."""
    blocked: float
    """Seconds that training has waited for it, but for what updates wait for the snapshot."""
    publishing: bool = False


class Saver:
    """Saves checkpoints, one at a time. Use as a context: leaving it abandons the save in flight, if there is one."""

    def __init__(
        self,
        engine: Engine,
        root: Path,
        ranks: Ranks,
        *,
        still_ours: Callable[[], None],
        sync_journal: Callable[[], None],
        prune: Callable[[int], object],
        warn: Callable[[str], None],
        published: Callable[[Published], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            still_ours: on rank 0's thread, right before the manifest is written; raises when the folder was taken over.
            sync_journal: on rank 0's thread, then: has the journal on disk, or a power loss would leave a checkpoint
                whose steps it does not know.
            prune: on rank 0's thread, when the manifest of a step is written. What it cannot do is a warning.
            warn: on rank 0, also on its thread: what could not be cleared away, once.
            published: on every rank's main thread, after that.
        """
        self._engine = engine
        self._root = root
        self._ranks = ranks
        self._still_ours = still_ours
        self._sync_journal = sync_journal
        self._prune = prune
        self._warn = warn
        self._warned: set[str] = set()
        self._published = published
        self._save: _Save | None = None
        self._newest: CheckpointManifest | None = None
        """The last one that was published; rank 0's thread alone knows it, and the losses."""
        self._losses: dict[int, float] = {}
        self._adding: Future[None] | None = None
        self._abandoned = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and not self._save.work.done()

    def start(self, step: int, state: dict[str, Any], validation_loss: float | None = None) -> None:
        """Begin to save the engine's state as it is now; a collective.

        On a CPU the thread copies it while training goes on; what is on a GPU is copied here. Waits for the save
        before, if it is still in flight. `state` is rank 0's: all that the manifest is to hold beside the tensors.

        Raises:
            CheckpointError: on every rank, when one could not write.
        """
        self.join()
        self._losses = {}  # of this very step, too, if the run was rolled back: another checkpoint had it
        since = time.perf_counter()
        path = step_path(self._root, step)
        self._ranks.together(lambda: self._prepare(path), only_first=True)
        engine, file = self._engine, path / f"shard-{self._ranks.rank:05d}.safetensors"
        fragments = engine.owned_fragments()
        engine.snapshot.begin(fragments)
        spans = [(f.name, f.start, f.numel) for f in fragments]
        tensors = engine.snapshot.tensors | {RNG + name: values for name, values in rng_states().items()}
        if self._ranks.is_first:
            buffers = engine.buffers.tensors
            tensors |= {BUFFER + name: values.to("cpu", copy=True) for name, values in buffers.items()}
        content = {
            "step": step,
            "optimizer_steps": engine.optimizer_steps,
            "world_size": self._ranks.world_size,
            "zero_stage": engine.stage,
            "shapes": engine.shapes,
            "states": engine.states,
            "buffers": {name: list(values.shape) for name, values in engine.buffers.tensors.items()},
            "state": state,
            "validation_loss": validation_loss,
            "saved": time.time(),
        }

        def write() -> CheckpointShard:
            engine.snapshot.copy()
            size, digest = write_tensors(file, tensors, self._abandoned)
            return CheckpointShard(file=file.name, bytes=size, xxh3_128=digest, fragments=spans)

        self._save = _Save(path, content, self._thread.submit(write), since, time.perf_counter() - since)

    def validated(self, step: int, loss: float) -> None:
        """Add its validation loss to the checkpoint of a step, in flight, published, or an earlier start's; on every
        rank."""
        self._adding = self._thread.submit(self._add_loss, step, loss)

    def poll(self, writing: bool) -> None:
        """Go on with the save in flight, unless a rank is still `writing`; a collective, and `writing` is agreed on.

        Raises:
            UserError: on every rank, when one failed.
        """
        if self._save and not writing:
            self._advance(self._save)

    def join(self) -> None:
        """Wait until the save in flight is published; a collective.

        Raises:
            UserError: on every rank, when one failed.
        """
        while self._save:
            self._advance(self._save)
        if self._adding:
            adding, self._adding = self._adding, None
            self._ranks.together(adding.result)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned.set()
        self._thread.shutdown()

    def _advance(self, save: _Save) -> None:
        since = time.perf_counter()
        self._save = None  # should it have failed
        result = self._ranks.together(save.work.result)
        if not save.publishing:
            shards = self._ranks.collect(result)
            save.work = self._thread.submit(self._publish, save, shards)
            save.publishing = True
            self._save = save
        save.blocked += time.perf_counter() - since
        if self._save is None:
            blocked = save.blocked + self._engine.snapshot.waited
            self._published(Published(save.content["step"], save.path, blocked, time.perf_counter() - save.since))

    def _prepare(self, path: Path) -> None:
        self._still_ours()  # else another's folder would get it, or one that was renamed would be made again
        try:
            make_room(path, self._warn)
            self._root.mkdir(exist_ok=True)
            path.mkdir()
        except OSError as error:
            raise write_error(path, error) from error

    def _publish(self, save: _Save, shards: list[CheckpointShard]) -> None:
        if not self._ranks.is_first:
            return
        loss = self._losses.get(save.content["step"], save.content["validation_loss"])
        manifest = CheckpointManifest(**save.content | {"validation_loss": loss}, shards=shards)
        self._write(manifest, save.path)

    def _add_loss(self, step: int, loss: float) -> None:
        if not self._ranks.is_first:
            return
        self._losses, path = {step: loss}, step_path(self._root, step)
        if self._newest is None and is_checkpoint(path):  # a validation that was broken off is made up for
            self._newest = CheckpointManifest.load(path)
        if self._newest and self._newest.step == step and self._newest.format == FORMAT:
            self._write(self._newest.model_copy(update={"validation_loss": loss}), path)

    def _write(self, manifest: CheckpointManifest, path: Path) -> None:
        """Seal the checkpoint, and let go of those that need not stay beside it."""
        self._still_ours()
        file = path / MANIFEST
        try:
            self._sync_journal()
            sync_folder(path)
            write_atomic(file, manifest.sealed())
            sync_folder(self._root)
        except OSError as error:
            raise write_error(file, error) from error
        self._newest = manifest
        try:
            self._prune(manifest.step)
        except (CheckpointError, OSError) as error:  # the run has what it needs to go on
            self._warn_once(f"old checkpoints stay: {error}")

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)
