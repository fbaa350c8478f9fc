"""What ranks measure between them: the links to their neighbours, an all-reduce, and their clocks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data_pipeline.errors import RunError
from pretrain.preflight import node as preflight_node
from pretrain.preflight.verdict import Finding, Link, Report

LINK_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
ROUNDS = 3
LARGEST_TERM = 1024
"""Of the sums that are checked: exact in fp32 up to 16,384 ranks."""


@dataclass(frozen=True)
class Place:
    """Where this process is among the ranks and on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str


class Exchange:
    """Adds to a report what only the ranks together can find. All ranks call the same methods in the same order."""

    def __init__(self, report: Report, place: Place, at: Callable[[str, int | None], None]) -> None:
        """`at` hears each step that this rank begins, and the rank it needs for it, if it needs only one."""
        self._report, self._place, self._at = report, place, at
        self._device = preflight_node.devices(place.local_rank, place.local_size)[0]

    def run(self, nodes: list[str], store: dist.Store, timeout: float) -> None:
        """All of it, over a process group of its own, whose operations end after `timeout` seconds.

        `nodes`: of each rank.
        """
        self._at("the meeting of the process group", None)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            backend="nccl" if self._device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=self._place.rank,
            world_size=self._place.world_size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            # To the next rank, and to the same GPU of the next node: each has a network card of its own.
            for stride in sorted({1, self._place.local_size} if len(set(nodes)) > 1 else {1}):
                self.link(stride)
            self.all_reduce()
            self.compare_clocks()
        finally:
            dist.destroy_process_group()

    def link(self, stride: int) -> None:
        """All ranks send at once, each to the one `stride` further; the best of some rounds counts."""
        rank, world_size = self._place.rank, self._place.world_size
        to, source = (rank + stride) % world_size, (rank - stride) % world_size
        sent = torch.full((LINK_BYTES[self._device.type],), rank % 251, dtype=torch.uint8, device=self._device)
        received = torch.empty_like(sent)

        def send() -> None:
            self._at("the links", source)
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
            ):
                work.wait()

        seconds = self._time(send)
        if not bool((received == source % 251).all()):
            raise RunError(f"rank {rank} received something else than rank {source} had sent")
        self._report.links.append(Link(source, rank, len(sent) / 2**30 / seconds))

    def all_reduce(self) -> None:
        """Sums of whole numbers, which are exact in any order."""
        size = REDUCED_BYTES[self._device.type] // 4
        pattern = torch.arange(size, dtype=torch.float32, device=self._device) % 7
        terms = [rank % LARGEST_TERM for rank in range(self._place.world_size)]
        values = torch.empty_like(pattern)

        def reduce() -> None:
            self._at("the all-reduce", None)
            torch.add(pattern, terms[self._place.rank], out=values)
            dist.all_reduce(values)

        self._report.all_reduce_gib_s = 4 * size / 2**30 / self._time(reduce)
        if not torch.equal(values, self._place.world_size * pattern + sum(terms)):
            text = f"rank {self._place.rank} got a wrong sum from an all-reduce"
            self._report.findings.append(Finding("all-reduce", "node", text))

    def compare_clocks(self) -> None:
        """Bounds of this clock minus rank 0's: no rank leaves a gathering before the last one has entered it.

        With entry e and exit x by each one's own clock: e_i - x_0 <= clock_i - clock_0 <= x_i - e_0.
        """
        low, high = -float("inf"), float("inf")
        for _ in range(ROUNDS):
            entered = time.time()
            entries = self._gather(entered)
            left = time.time()
            exits = self._gather(left)
            low, high = max(low, entered - exits[0]), min(high, left - entries[0])
        self._report.clock = low, high

    def _time(self, work: Callable[[], None]) -> float:
        """Seconds of the quickest round; all ranks begin each together."""
        best = float("inf")
        for _ in range(ROUNDS):
            self._at("a barrier", None)
            dist.all_reduce(torch.zeros(1, device=self._device))
            preflight_node.wait(self._device)
            since = time.perf_counter()
            work()
            preflight_node.wait(self._device)
            best = min(best, time.perf_counter() - since)
            self._at("its own work between two exchanges", None)
        return best

    def _gather(self, value: float) -> list[float]:
        self._at("the clocks", None)
        values = [torch.zeros(1, dtype=torch.float64, device=self._device) for _ in range(self._place.world_size)]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64, device=self._device))
        return [float(v) for v in torch.cat(values).cpu()]
