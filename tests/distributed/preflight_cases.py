"""Preflights in which one rank has a fault; started through the fixture `ranks`. Each rank is a node of its own."""

import os
import resource
import signal
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import model.parameters  # noqa: F401 - else each rank imports it
from pretrain import preflight_exchange, preflight_node
from pretrain.config import load
from pretrain.distributed import Ranks
from pretrain.preflight_exchange import Exchange, Place
from pretrain.preflight_group import Limits, NoLeader, preflight


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
    if fault == "killed" and (child := os.fork()):
        os.waitpid(child, 0)
        return None
    if fault:
        FAULTS[fault]()
    store = store or dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
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


def slow() -> None:
    once = torch.mm
    put(torch, "mm", lambda a, b: [once(a, b) for _ in range(12)][-1])


def miscalculating() -> None:
    once = torch.mm

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = once(a, b)
        product[17, 4] += 1
        return product

    put(torch, "mm", wrong)


def outdated() -> None:
    put(preflight_node, "version", lambda package: {"torch": "2.9.0", "deepspeed": "0.19.8"}[package])


def full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def ahead() -> None:
    put(
        preflight_exchange,
        "time",
        SimpleNamespace(time=lambda: time.time() + 7, perf_counter=time.perf_counter),
    )


def hanging() -> None:
    put(preflight_node, "multiply", lambda device: threading.Event().wait())


def late() -> None:
    """Before it enters the barrier in which the others wait."""
    put(Exchange, "all_reduce", lambda self: threading.Event().wait())


def mute() -> None:
    once = dist.batch_isend_irecv
    put(dist, "batch_isend_irecv", lambda operations: once(operations[1:]))


def stopped() -> None:
    put(Exchange, "all_reduce", lambda self: os.kill(os.getpid(), signal.SIGSTOP))


def killed() -> None:
    put(Exchange, "all_reduce", lambda self: os.kill(os.getpid(), signal.SIGKILL))


def put(owner: Any, name: str, value: Any) -> None:
    """For the rest of this process."""
    setattr(owner, name, value)


FAULTS = {
    fault.__name__: fault
    for fault in (slow, miscalculating, outdated, full, ahead, hanging, late, mute, stopped, killed)
}
