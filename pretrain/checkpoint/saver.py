"""Saving behind the training: one thread of each rank copies and writes; an update waits until the copy is made.

A save has two parts. First each rank's thread copies what the rank holds and writes it, its shard; then rank 0's thread
publishes: it writes the manifest, which makes the directory a checkpoint, and lets old ones go. No pass forward or
backward changes parameters or optimizer states, so the copy has time until the engine is about to: then the main thread
takes part in what is left of it (`Engine.before_change`). The threads never touch the process group. That every rank
is done with its part is agreed on by the main threads, at the edge of a step, with a flag that travels with the request
to stop. So collectives keep their order, a rank whose disk is full still can say so, and nothing depends on how soon
one node sees the other's files.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Event
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import CheckpointError
from data_pipeline.files.atomic import sync_folder, write_atomic
from pretrain.checkpoint.checkpoint import RNG
from pretrain.checkpoint.manifest import BUFFER, CheckpointManifest, CheckpointShard
from pretrain.checkpoint.shard_file import write_error, write_tensors
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine, Fragment
from pretrain.engine.rng import rng_states
from pretrain.run.checkpoint_folder import MANIFEST, make_room, step_path

COPY_BLOCK = 4 * 2**20
"""Bytes that a thread copies at once."""
Blocks = Queue[tuple[np.ndarray, np.ndarray]]
"""What is still to be copied: to, from; each uint8 [n], n at most COPY_BLOCK."""


@dataclass
class _Save:
    """The save in flight."""

    path: Path
    content: dict[str, Any]
    """Of the manifest, but for the shards."""
    blocks: Blocks
    work: Future[Any]
    """Of this rank's thread: its shard, later the publication."""
    publishing: bool = False
    blocked: float = 0.0
    """Seconds that training has waited for this save."""


class Saver:
    """Saves checkpoints, one at a time. Use as a context: leaving it abandons the save in flight, if there is one."""

    def __init__(
        self,
        engine: Engine,
        root: Path,
        ranks: Ranks,
        *,
        still_ours: Callable[[], None],
        prune: Callable[[int], object],
        warn: Callable[[str], None],
        published: Callable[[int, Path, float], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            still_ours: on rank 0's thread, right before the manifest is written; raises when the folder was taken over.
            prune: on rank 0's thread, when the manifest of a step is written. What it cannot do is a warning.
            warn: on rank 0, also on its thread: what could not be cleared away, once.
            published: on every rank's main thread, after that: step, directory, how many seconds training waited.
        """
        self._engine = engine
        self._root = root
        self._ranks = ranks
        self._still_ours = still_ours
        self._prune = prune
        self._warn = warn
        self._warned: set[str] = set()
        self._published = published
        self._buffers: dict[str, Tensor] = {}
        self._save: _Save | None = None
        self._abandoned = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and not self._save.work.done()

    def start(self, step: int, state: dict[str, Any], validation_loss: float | None = None) -> None:
        """Begin to save the engine's state as it is now; a collective.

        On a CPU the thread copies it while training goes on, and the engine calls back before it changes; what is on a
        GPU is copied here. Waits for the save before, if it is still in flight. `state` is rank 0's: all that the
        manifest is to hold beside the tensors.

        Raises:
            CheckpointError: on every rank, when one could not write.
        """
        self.join()
        since = time.perf_counter()
        path = step_path(self._root, step)

        def prepare() -> None:
            self._still_ours()  # else another's folder would get it, or one that was renamed would be made again
            try:
                make_room(path, self._warn)
                self._root.mkdir(exist_ok=True)
                path.mkdir()
            except OSError as error:
                raise write_error(path, error) from error

        self._ranks.together(prepare, only_first=True)
        fragments = self._engine.owned_fragments()
        blocks = self._begin_copy(fragments)
        self._engine.before_change = self._finish_copy
        tensors = self._buffers | {RNG + name: values for name, values in rng_states().items()}
        buffers = self._engine.buffers.tensors
        if self._ranks.is_first:
            tensors |= {BUFFER + name: values.to("cpu", copy=True) for name, values in buffers.items()}
        content = {
            "step": step,
            "optimizer_steps": self._engine.optimizer_steps,
            "world_size": self._ranks.world_size,
            "zero_stage": self._engine.stage,
            "shapes": self._engine.shapes,
            "states": self._engine.states,
            "buffers": {name: list(values.shape) for name, values in buffers.items()},
            "state": state,
            "validation_loss": validation_loss,
            "saved": time.time(),
        }
        file = path / f"shard-{self._ranks.rank:05d}.safetensors"
        spans = [(f.name, f.start, f.numel) for f in fragments]

        def write() -> CheckpointShard:
            _copy(blocks)
            size, digest = write_tensors(file, tensors, self._abandoned)
            return CheckpointShard(file=file.name, bytes=size, xxh3_128=digest, fragments=spans)

        self._save = _Save(path, content, blocks, self._thread.submit(write), blocked=time.perf_counter() - since)

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
            shards = self._ranks.gather(result)
            save.work = self._thread.submit(self._publish, save, shards)
            save.publishing = True
            self._save = save
        save.blocked += time.perf_counter() - since
        if self._save is None:
            self._published(save.content["step"], save.path, save.blocked)

    def _publish(self, save: _Save, shards: list[CheckpointShard]) -> None:
        if not self._ranks.is_first:
            return
        self._still_ours()
        manifest = CheckpointManifest(**save.content, shards=shards)
        file = save.path / MANIFEST
        try:
            sync_folder(save.path)
            write_atomic(file, manifest.sealed())
            sync_folder(self._root)
        except OSError as error:
            raise write_error(file, error) from error
        try:
            self._prune(manifest.step)
        except (CheckpointError, OSError) as error:  # the run has what it needs to go on
            self._warn_once(f"old checkpoints stay: {error}")

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def _begin_copy(self, fragments: list[Fragment]) -> Blocks:
        """Into a flat tensor for each kind of state, in memory that is allocated once: the save before has ended.

        Returns:
            what is left to be copied.
        """
        cuda = self._ranks.device.type == "cuda"
        if not self._buffers:
            sizes: dict[str, tuple[int, torch.dtype]] = {}
            for fragment in fragments:
                for state, values in fragment.states.items():
                    sizes[state] = (sizes.get(state, (0, values.dtype))[0] + fragment.numel, values.dtype)
            for state, (numel, dtype) in sizes.items():
                self._buffers[state] = torch.empty(numel, dtype=dtype, pin_memory=cuda)
        ends = dict.fromkeys(self._buffers, 0)
        blocks = Blocks()
        for fragment in fragments:
            for state, values in fragment.states.items():
                start, ends[state] = ends[state], ends[state] + fragment.numel
                buffer = self._buffers[state][start : ends[state]]
                if cuda:
                    buffer.copy_(values, non_blocking=True)
                else:
                    _put(blocks, buffer, values)
        if cuda:
            torch.cuda.synchronize(self._ranks.device)
        return blocks

    def _finish_copy(self) -> None:
        """The engine is about to change what is being copied."""
        if self._save:
            since = time.perf_counter()
            _copy(self._save.blocks)
            self._save.blocked += time.perf_counter() - since


def _put(blocks: Blocks, buffer: Tensor, values: Tensor) -> None:
    to, source = (tensor.view(torch.uint8).numpy() for tensor in (buffer, values))
    for start in range(0, len(to), COPY_BLOCK):
        blocks.put((to[start : start + COPY_BLOCK], source[start : start + COPY_BLOCK]))


def _copy(blocks: Blocks) -> None:
    """Take part in the copy until it is made. A thread that fails leaves the rest to the other, and its save fails.

    By memcpy: torch's own copy waits at a barrier of its threads, long when other work has the cores.
    """
    while True:
        try:
            to, source = blocks.get_nowait()
        except Empty:
            break
        try:
            np.copyto(to, source)
        finally:
            blocks.task_done()
    blocks.join()
