"""What an engine does about the machine that it runs on."""

import resource
from collections.abc import Callable
from typing import Any

import torch

from pretrain.engine.distributed import Ranks
from pretrain.engine.hardware import keep_freed_memory

CPU = torch.device("cpu")


def faults(ranks: Ranks) -> list[int]:
    """Pages that the system had to give to ten tensors of 8 MiB, one after the other, before and after."""
    found = []
    for prepare in (lambda: None, lambda: keep_freed_memory(CPU)):
        prepare()
        torch.ones(2**21)
        since = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**21)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - since)
    return found


def test_memory_that_tensors_leave_serves_the_next_ones(ranks: Callable[..., list[Any]]) -> None:
    [[given_back, kept]] = ranks("tests.pretrain.engine.test_hardware:faults", 1)
    assert given_back > 1000, "where the C library keeps it by itself this is not needed"
    assert kept < 100
