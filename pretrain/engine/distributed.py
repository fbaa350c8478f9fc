"""The ranks of a run: how they meet, and how they agree."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import ConfigError, UserError

T = TypeVar("T")
PARTING = timedelta(hours=1)
"""Longer than rank 0 may take after the end (`signals.LONGEST_SECONDS`), should it hang where nothing reaches it."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    device: torch.device
    group: Any
    """A gloo group for book-keeping: never waits for the accelerator."""
    sequence_parallel: int = 1
    """Ranks, side by side, that share the rows of their batches."""
    timeout: timedelta = timedelta(minutes=10)
    """Of a collective."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes the journal, the manifest and the terminal."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Which of the `readers` this rank belongs to: ranks that share rows read the same ones."""
        return self.rank // self.sequence_parallel

    @property
    def readers(self) -> int:
        """That read different rows."""
        return self.world_size // self.sequence_parallel

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, value: T) -> list[T]:
        """Every rank's value on rank 0, in rank order; nothing on the others."""
        values: list[Any] = [None] * self.world_size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None, dst=0, group=self.group)
        return values

    def largest(self, *flags: int) -> list[int]:
        """The largest of all ranks' values of each flag, on every rank."""
        if self.world_size == 1:  # asked at each step: a collective with nobody takes 0.2 ms
            return [*flags]
        box = torch.tensor(flags)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        return box.tolist()

    def mean_on_device(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks, where the values are; queued behind the device's work, the host does not wait for it."""
        mean = value.detach().to(torch.promote_types(value.dtype, torch.float32)) / self.world_size
        dist.all_reduce(mean)
        return mean

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in the values' own type; else as `mean_on_device`."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in float64 on the CPU."""
        total = values.detach().to("cpu", torch.float64)
        dist.all_reduce(total, group=self.group)
        return total

    def together(self, work: Callable[[], T], only_first: bool = False) -> T:
        """Run `work` on every rank (or on rank 0 alone, for all of them); if it fails on one, it fails on all.

        A user's mistake seen by one rank would otherwise leave the others waiting in the next collective.

        Raises:
            UserError: with the message of the first rank that failed.
        """
        result, failure = None, None
        if self.is_first or not only_first:
            try:
                result = work()
            except UserError as error:
                failure = error
        if any(self.largest(int(failure is not None))):  # one number of each rank, where all is well
            raise next(f for f in self.gather(failure) if f is not None)
        return self.broadcast(result) if only_first else result  # type: ignore[return-value]

    def part(self) -> None:
        """Wait until rank 0 gets here, or is gone. Takes no processor time, and may last longer than a collective."""
        with suppress(RuntimeError):  # whom one waits for, or who should wait, is gone
            if not self.is_first and (word := dist.irecv(torch.zeros(1), 0, group=self.group)):
                word.wait(PARTING)
        for rank in range(1, self.world_size if self.is_first else 0):
            with suppress(RuntimeError):
                dist.send(torch.zeros(1), rank, group=self.group)


@contextmanager
def join(timeout_minutes: float, sequence_parallel: int = 1) -> Iterator[Ranks]:
    """Meet the other ranks, and part from them in the end; so many of them share rows.

    Reads RANK, WORLD_SIZE, LOCAL_RANK (or srun's SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID; one rank when there is
    neither) and where to meet: DUET_RENDEZVOUS, a URL, else MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: the variables are incomplete.
    """
    rank = int(_variable("RANK", "SLURM_PROCID", "0"))
    world_size = int(_variable("WORLD_SIZE", "SLURM_NTASKS", "1"))
    local_rank = int(_variable("LOCAL_RANK", "SLURM_LOCALID", "0"))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}
    timeout = timedelta(minutes=timeout_minutes)
    store = dist.HashStore() if world_size == 1 else None
    where = os.environ.get("DUET_RENDEZVOUS")
    if world_size > 1 and not where and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(f"{world_size} ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if cuda else "gloo",
        init_method=None if store else where or "env://",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        group = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
        yield Ranks(rank, world_size, device, group, sequence_parallel, timeout)
    finally:
        # Without this, ranks abort at exit about every second time.
        dist.destroy_process_group()


def _variable(name: str, slurm_name: str, default: str) -> str:
    return os.environ.get(name) or os.environ.get(slurm_name) or default
