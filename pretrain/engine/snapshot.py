"""A copy of what a rank holds, made by a thread while the training goes on; the next update waits until it is made.

No pass forward or backward changes parameters or optimizer states, so the copy has time until an update is due. Then
the main thread takes part in what is left of it.
"""

import time
from collections.abc import Iterable
from queue import Empty, Queue

import numpy as np
import torch
from torch import Tensor

from pretrain.engine.fragments import Fragment

COPY_BLOCK = 4 * 2**20
"""Bytes that a thread copies at once."""
Blocks = Queue[tuple[np.ndarray, np.ndarray]]
"""What is still to be copied: to, from; each uint8 [n], n at most COPY_BLOCK."""


class Snapshot:
    """The engine's, one at a time, in memory that is allocated once."""

    def __init__(self, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        """A flat one for each kind of state; what they hold counts once `copy` has returned."""
        self.waited = 0.0
        """Seconds that updates have waited for this copy."""
        self._device = device
        self._blocks = Blocks()

    def begin(self, fragments: Iterable[Fragment]) -> None:
        """Copy these, one after the other; on a GPU at once. The copy before must be made, or be of no use any more."""
        cuda = self._device.type == "cuda"
        states = [(state, values) for fragment in fragments for state, values in fragment.states.items()]
        if not self.tensors:
            sizes: dict[str, tuple[int, torch.dtype]] = {}
            for state, values in states:
                sizes[state] = (sizes.get(state, (0, values.dtype))[0] + values.numel(), values.dtype)
            for state, (numel, dtype) in sizes.items():
                self.tensors[state] = torch.empty(numel, dtype=dtype, pin_memory=cuda)
        self.waited, self._blocks = 0.0, Blocks()
        ends = dict.fromkeys(self.tensors, 0)
        for state, values in states:
            start, ends[state] = ends[state], ends[state] + values.numel()
            target = self.tensors[state][start : ends[state]]
            if cuda:
                target.copy_(values, non_blocking=True)
            else:
                to, source = (tensor.view(torch.uint8).numpy() for tensor in (target, values))
                for at in range(0, len(to), COPY_BLOCK):
                    self._blocks.put((to[at : at + COPY_BLOCK], source[at : at + COPY_BLOCK]))
        if cuda:
            torch.cuda.synchronize(self._device)

    def copy(self) -> None:
        """Take part until it is made. A thread that fails leaves the rest to the other.

        By memcpy: torch's own copy waits at a barrier of its threads, long when other work has the cores.
        """
        blocks = self._blocks
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

    def before_change(self) -> None:
        """What is copied is about to change."""
        since = time.perf_counter()
        self.copy()
        self.waited += time.perf_counter() - since
