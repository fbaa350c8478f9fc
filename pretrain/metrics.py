"""Metrics of the training steps: kept on the device, fetched once in a while."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from pretrain.distributed import Ranks

NAMES = {
    "cross_entropy": "loss/train",
    "loss": "loss/total",
    "entropy": "penalty/entropy",
    "l1": "penalty/l1",
    "entropy_weight": "penalty/entropy_weight",
    "l1_weight": "penalty/l1_weight",
}
"""What the model calls a metric and where a reader finds it; all others are the gates'."""


@dataclass(frozen=True)
class StepMetrics:
    """One step's line of the journal."""

    step: int
    values: dict[str, float]


class Meter:
    """Collects each step's metrics without waiting for the device; `flush` averages them over the ranks."""

    def __init__(self, ranks: Ranks, tokens_per_step: int) -> None:
        self._ranks = ranks
        self._tokens_per_step = tokens_per_step
        self._steps: list[tuple[int, dict[str, Tensor], Mapping[str, Any]]] = []
        self._since = time.perf_counter()

    def add(self, step: int, micro_batches: list[dict[str, Tensor]], known: Mapping[str, Any]) -> None:
        """Take one step: the model's metrics of each micro-batch, and numbers (or 0-d tensors) that all ranks share."""
        means = {name: torch.stack([m[name].float() for m in micro_batches]).mean() for name in micro_batches[0]}
        self._steps.append((step, means, known))

    def flush(self) -> list[StepMetrics]:
        """All steps since the last flush, averaged over the ranks; the last one carries speed and memory.

        A collective: every rank calls it at the same steps.
        """
        if not self._steps:
            return []
        names = list(self._steps[0][1])
        table = torch.stack([torch.stack([means[name] for name in names]) for _, means, _ in self._steps])
        rows = (self._ranks.sum(table) / self._ranks.world_size).tolist()
        lines = [
            StepMetrics(step, _named(dict(zip(names, row, strict=True))) | {k: float(v) for k, v in known.items()})
            for (step, _, known), row in zip(self._steps, rows, strict=True)
        ]
        seconds = time.perf_counter() - self._since
        lines[-1].values.update(
            {
                "time/tokens_per_second": self._tokens_per_step * len(lines) / seconds,
                "time/step_ms": 1e3 * seconds / len(lines),
                "system/memory_gib": _memory_gib(self._ranks.device),
            }
        )
        self._steps.clear()
        self._since = time.perf_counter()
        return lines

    def resume_clock(self) -> None:
        """Leave out of the speed what happened since the last flush: validation, a checkpoint."""
        self._since = time.perf_counter()


def _named(values: dict[str, float]) -> dict[str, float]:
    return {NAMES.get(name, f"gate/{name}"): value for name, value in values.items()}


def _memory_gib(device: torch.device) -> float:
    """Peak of the allocator on a GPU, resident memory of this rank on a CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
