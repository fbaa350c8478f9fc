"""Saving behind the training: a step waits for the copy to host memory, one thread of each rank writes.

A save has two parts. First each rank's thread writes its shard; then rank 0's thread publishes: it writes the manifest,
which makes the directory a checkpoint, and lets old ones go. The threads never touch the process group. That every rank
is done with its part is agreed on by the main threads, at the edge of a step, with a flag that travels with the request
to stop. So collectives keep their order, a rank whose disk is full still can say so, and nothing depends on how soon
one node sees the other's files.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.atomic import sync_folder, write_atomic
from pretrain.checkpoint import BUFFER, RNG, Manifest, remove, step_path
from pretrain.distributed import Ranks
from pretrain.engine import Engine, Fragment
from pretrain.rng import rng_states
from pretrain.shard import Shard, write_error, write_tensors

COPY_BLOCK = 1 << 20
"""Elements that one of the two copying threads takes at once."""


@dataclass
class _Save:
    """The save in flight."""

    path: Path
    content: dict[str, Any]
    """Of the manifest, but for the shards."""
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
        prune: Callable[[], object],
        published: Callable[[int, Path, float], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            still_ours: on rank 0's thread, right before the manifest is written; raises when the folder was taken over.
            prune: on rank 0's thread, when the manifest is written.
            published: on every rank's main thread, after that: step, directory, how many seconds training waited.
        """
        self._engine = engine
        self._root = root
        self._ranks = ranks
        self._still_ours = still_ours
        self._prune = prune
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
        """Copy parameters and optimizer states to the host and begin to write them; a collective.

        Waits for the save before, if it is still in flight. `state` is rank 0's: all that the manifest is to hold
        beside the tensors.

        Raises:
            CheckpointError: on every rank, when one could not write.
        """
        self.join()
        since = time.perf_counter()
        path = step_path(self._root, step)

        def prepare() -> None:
            try:
                if path.exists():  # left by a crash, or damaged
                    remove(path)
                path.mkdir(parents=True)
            except OSError as error:
                raise write_error(path, error) from error

        self._ranks.together(prepare, only_first=True)
        fragments = self._engine.owned_fragments()
        tensors = self._copy_to_host(fragments) | {RNG + name: values for name, values in rng_states().items()}
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

        def write() -> Shard:
            size, digest = write_tensors(file, tensors, self._abandoned)
            return Shard(file=file.name, bytes=size, xxh3_128=digest, fragments=spans)

        self._save = _Save(path, content, self._thread.submit(write), blocked=time.perf_counter() - since)

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

    def _publish(self, save: _Save, shards: list[Shard]) -> None:
        if not self._ranks.is_first:
            return
        self._still_ours()
        manifest = Manifest(**save.content, shards=shards)
        file = save.path / "manifest.json"
        try:
            sync_folder(save.path)
            write_atomic(file, manifest.model_dump_json(indent=1))
            sync_folder(self._root)
        except OSError as error:
            raise write_error(file, error) from error
        self._prune()

    def _copy_to_host(self, fragments: list[Fragment]) -> dict[str, Tensor]:
        """A flat tensor for each kind of state, in memory that is allocated once: the save before has ended."""
        cuda = self._ranks.device.type == "cuda"
        if not self._buffers:
            sizes: dict[str, tuple[int, torch.dtype]] = {}
            for fragment in fragments:
                for state, values in fragment.states.items():
                    sizes[state] = (sizes.get(state, (0, values.dtype))[0] + fragment.numel, values.dtype)
            for state, (numel, dtype) in sizes.items():
                self._buffers[state] = torch.empty(numel, dtype=dtype, pin_memory=cuda)
        ends = dict.fromkeys(self._buffers, 0)
        copies: list[tuple[Tensor, Tensor]] = []
        for fragment in fragments:
            for state, values in fragment.states.items():
                start, ends[state] = ends[state], ends[state] + fragment.numel
                copies.append((self._buffers[state][start : ends[state]], values))
        if cuda:
            for buffer, values in copies:
                buffer.copy_(values, non_blocking=True)
            torch.cuda.synchronize(self._ranks.device)
        else:
            blocks = [pair for buffer, values in copies for pair in _blocks(buffer, values)]
            half = self._thread.submit(_copy, blocks[::2])  # it has nothing else to do now
            _copy(blocks[1::2])
            half.result()
        return self._buffers


def _blocks(buffer: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(buffer.split(COPY_BLOCK), values.split(COPY_BLOCK), strict=True)


def _copy(blocks: list[tuple[Tensor, Tensor]]) -> None:
    """By memcpy: torch's own copy waits at a barrier of its threads, long when other work has the cores."""
    for buffer, values in blocks:
        np.copyto(buffer.view(torch.uint8).numpy(), values.view(torch.uint8).numpy())
