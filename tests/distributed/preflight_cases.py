"""Preflights in which one rank has a fault; started through the fixture `ranks`. Each rank is a node of its own.

A limit is for the rank that has the fault, and for its stage: good ranks, and the stages before, may take their time.
"""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import model.costs.totals  # noqa: F401 - else each rank imports it
from pretrain.config.schema import load
from pretrain.engine.distributed import Ranks
from pretrain.preflight import exchange, node
from pretrain.preflight.exchange import Exchange, Place
from pretrain.preflight.group import STAGES, Limits, Meeting, NoLeader, preflight

HANGS_IN = {"hanging": "compute", "late": "network", "mute": "network", "stopped": "network", "killed": "network"}
"""The stage that does not end."""
DEAD = ("absent", "stopped", "killed")
stores: list[dist.TCPStore] = []
"""Where this rank tells that its fault has begun."""


def run(
    ranks: Ranks, args: list[list[str]], faults: dict[str, str] | None = None, **limits: float
) -> dict[str, Any] | None:
    """The verdict on rank 0. `args` by rank; `faults` of some ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks.is_first else None
    port = ranks.broadcast(store.port if store else None)
    pids = ranks.gather(os.getpid())
    dist.destroy_process_group()
    put(dist, "destroy_process_group", lambda: None)  # the fixture's group is gone, and ours may hang
    fault = (faults or {}).get(str(ranks.rank))
    if fault == "absent":
        return None
    store = store or dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    stores.append(store.clone())  # type: ignore[attr-defined]
    if fault:
        FAULTS[fault]()
    if ranks.is_first:
        wait_for_the_good(ranks.world_size, list((faults or {}).values()))
    place = Place(ranks.rank, ranks.world_size, 0, 1, f"n{ranks.rank}")
    planned = [f"n{rank}" for rank in range(ranks.world_size)]
    try:
        verdict = preflight(load(args[ranks.rank]), place, store, planned, Limits(**limits))
    except NoLeader:  # of a rank that was stopped, and goes on
        return None
    for rank, name in (faults or {}).items():
        if ranks.is_first and name == "stopped":
            os.kill(pids[int(rank)], signal.SIGCONT)
    return asdict(verdict) if verdict else None


def wait_for_the_good(world_size: int, faults: list[str]) -> None:
    """Rank 0's limits begin when all that is good has come as far as it can."""
    collect = Meeting.collect
    hanging = {HANGS_IN[fault] for fault in faults if fault in HANGS_IN}
    answering = world_size - sum(fault in DEAD for fault in faults)

    def wait_for(count: str, wanted: int) -> None:
        while stores[0].add(count, 0) < wanted:
            time.sleep(0.01)

    def collect_later(self: Meeting, topic: str, seconds: float) -> dict[int, Any]:
        if topic in ("answer", "left"):
            wait_for(f"{topic}/count", answering)
        elif topic in hanging:
            wait_for("struck", len(faults))
        elif topic in STAGES:
            seconds = 60
        return collect(self, topic, seconds)

    put(Meeting, "collect", collect_later)


def striking(fault: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but tells first that it begins."""

    def strike(*given: Any) -> Any:
        stores[0].add("struck", 1)
        return fault(*given)

    return strike


def slow() -> None:
    """Five times slower than the others is bad, and these may be slow themselves."""
    once = torch.mm

    def slowly(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        since = time.perf_counter()
        product = once(a, b)
        time.sleep(24 * (time.perf_counter() - since))
        return product

    put(torch, "mm", slowly)


def miscalculating() -> None:
    once = torch.mm

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = once(a, b)
        product[17, 4] += 1
        return product

    put(torch, "mm", wrong)


def outdated() -> None:
    put(node, "version", lambda package: {"torch": "2.9.0", "deepspeed": "0.19.8"}[package])


def full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def ahead() -> None:
    put(
        exchange,
        "time",
        SimpleNamespace(time=lambda: time.time() + 7, perf_counter=time.perf_counter),
    )


def hanging() -> None:
    put(node, "multiply", striking(lambda device: threading.Event().wait()))


def late() -> None:
    """Before it enters the barrier in which the others wait."""
    put(Exchange, "all_reduce", striking(lambda self: threading.Event().wait()))


def mute() -> None:
    once = dist.batch_isend_irecv
    put(dist, "batch_isend_irecv", striking(lambda operations: once(operations[1:])))


def stopped() -> None:
    put(Exchange, "all_reduce", striking(lambda self: os.kill(os.getpid(), signal.SIGSTOP)))


def killed() -> None:
    put(Exchange, "all_reduce", striking(lambda self: os.kill(os.getpid(), signal.SIGKILL)))


def put(owner: Any, name: str, value: Any) -> None:
    """For the rest of this process."""
    setattr(owner, name, value)


FAULTS = {
    fault.__name__: fault
    for fault in (slow, miscalculating, outdated, full, ahead, hanging, late, mute, stopped, killed)
}
