"""Metrics of the training steps: kept on the device, fetched once in a while."""

import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from model.config.transformer import TransformerConfig
from model.costs.flops import gated_share, trains_open_blocks, utilisation_per_token
from model.masks.telemetry import told
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.metric_names import (
    BACKWARD_MS,
    DATA_MS,
    FORWARD_MS,
    GOODPUT,
    HOST_MEMORY,
    MEMORY,
    MFU,
    OPTIMIZER_MS,
    PARAM_NORM,
    PEAK_MEMORY,
    RANK_SPREAD,
    RESTARTS,
    SKIPPED,
    STEP_MS,
    STEPS_SKIPPED,
    TOKENS_PER_SECOND,
    TOKENS_PER_SECOND_PER_DEVICE,
    UPDATE_RATIO,
    of_model,
)
from pretrain.run.goodput import Goodput

SLOW = 1.2
"""A rank whose own work takes this many times the mean is worth a record."""


@dataclass(frozen=True)
class Slowest:
    """A rank that holds up the others, by the factor `ratio`."""

    rank: int
    host: str
    ratio: float


@dataclass(frozen=True)
class StepMetrics:
    """One step's line of the journal; the last one of a window tells who held it up."""

    step: int
    values: dict[str, float]
    slowest: Slowest | None = None


class Meter:
    """Collects each step's metrics without waiting for the device; `flush` averages them over the ranks."""

    def __init__(self, config: Config, engine: Engine, ranks: Ranks, goodput: Goodput, restarts: int) -> None:
        """A collective. `goodput` and `restarts`: what earlier attempts leave to this one."""
        self._engine = engine
        self._ranks = ranks
        self._goodput = goodput
        self._restarts = restarts
        self._tokens_per_step = config.batch.tokens
        device_name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        self._utilisation_per_token = utilisation_per_token(
            config.model, device_name, ranks.world_size, config.objective.of_pairs
        )
        self._gates = config.model.block_gates if isinstance(config.model, TransformerConfig) else None
        tokens = config.micro_batches(ranks.world_size)[0] * config.model.context // ranks.sequence_parallel
        cuda = ranks.device.type == "cuda"
        sparse = self._utilisation_per_token is not None and trains_open_blocks(
            config.model, tokens, compiled=config.engine.compile, cuda=cuda
        )
        self._gated_share = gated_share(config.model, config.objective.of_pairs) if sparse else 0.0
        self._hosts = ranks.gather(platform.node())
        self._shapes: dict[str, torch.Size] = {}
        self._steps: list[tuple[int, Tensor, Callable[[], Mapping[str, Any]]]] = []
        self._since = time.perf_counter()

    def add(self, step: int, micro_batches: list[dict[str, Tensor]], known: Callable[[], Mapping[str, Any]]) -> None:
        """Take one step: the model's metrics of each micro-batch, and, asked for by `flush`, numbers (or 0-d tensors)
        that all ranks share.

        The model gives what is a mean over the step once it is averaged over micro-batches and ranks; `told` makes
        numbers of the moments among it, which are in float64.
        """
        numbers = [name for name, value in micro_batches[0].items() if not value.ndim]
        moments = [name for name, value in micro_batches[0].items() if value.ndim]
        self._shapes = {name: micro_batches[0][name].shape for name in (*numbers, *moments)}
        table = torch.stack([metrics[name].float() for name in numbers for metrics in micro_batches])
        means = [table.view(len(numbers), -1).mean(dim=-1).double()]
        if moments:
            means.append(
                torch.stack([torch.cat([of_one[name] for name in moments]) for of_one in micro_batches]).mean(0)
            )
        self._steps.append((step, torch.cat(means), known))

    def flush(self) -> list[StepMetrics]:
        """All steps since the last flush, averaged over the ranks; the last one carries what is measured
        over all of them: times, norms, and, since there are many, the metrics of single masks.

        A collective: every rank calls it at the same steps.
        """
        if not self._steps:
            return []
        table = self._ranks.sum(torch.stack([means for _, means, _ in self._steps])) / self._ranks.world_size
        columns = table.split([shape.numel() for shape in self._shapes.values()], dim=1)
        shaped = zip(self._shapes.items(), columns, strict=True)
        found = told({name: column.reshape(-1, *shape) for (name, shape), column in shaped})
        table = torch.stack(list(found.values()), dim=1)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        lines = [
            StepMetrics(step, _named(row, of_a_mask=False) | {name: float(value) for name, value in known().items()})
            for (step, _, known), row in zip(self._steps, _rows(found, table), strict=True)
        ]
        [masks] = _rows(found, table.mean(dim=0, keepdim=True))
        self._steps.clear()
        last, parts = lines[-1], self._engine.stopwatch.read()
        about_ranks, slowest = self._compare_ranks(parts)
        skipped = sum(SKIPPED in line.values for line in lines)
        self._goodput.add(seconds * (1 - skipped / len(lines)))
        values = (
            last.values
            | _named(masks, of_a_mask=True)
            | self._times(seconds, len(lines), parts, last.step, masks)
            | about_ranks
            | self._health(last.step)
        )
        lines[-1] = StepMetrics(last.step, values, slowest)
        return lines

    def resume_clock(self) -> None:
        """Leave out of the speed what happened since the last flush: validation, a checkpoint."""
        self._since = time.perf_counter()

    def rewind(self, goodput: Goodput) -> None:
        """The run went back to an older checkpoint; so much is productive still."""
        self._goodput = goodput
        self.resume_clock()

    def _times(
        self, seconds: float, steps: int, parts: dict[str, float], step: int, masks: Mapping[str, float]
    ) -> dict[str, float]:
        """Speed, means over the window's steps, and shares.

        The step is timed by the clock, its parts by rank 0's stopwatch. They leave out what is neither: agreement on
        signals, logging. `time/backward_ms` includes the reduction of gradients. `time/mfu` is a share of the dense
        bf16 peak, in fp32, too; of gated blocks only those count that were computed.
        """
        speed = self._tokens_per_step * steps / seconds
        milliseconds = {part: 1e3 * parts[part] / steps for part in parts}
        values: dict[str, float] = {
            TOKENS_PER_SECOND: speed,
            TOKENS_PER_SECOND_PER_DEVICE: speed / self._ranks.world_size,
            STEP_MS: 1e3 * seconds / steps,
            DATA_MS: milliseconds["data"],
            FORWARD_MS: milliseconds["forward"],
            BACKWARD_MS: milliseconds["backward"] + milliseconds["reduce"],
            OPTIMIZER_MS: milliseconds["optimizer"],
            GOODPUT: self._goodput.share(),
        }
        if self._utilisation_per_token:
            values[MFU] = speed * self._utilisation_per_token * self._executed(step, masks)
        return values

    def _executed(self, step: int, masks: Mapping[str, float]) -> float:
        """Of the FLOPs of a token, the share that was executed at `step`, by what is told of single masks."""
        if not self._gated_share or self._gates is None or not self._gates.sparse_at(step):
            return 1.0
        density = [masks[f"density/{site}"] for site in self._engine.gated_sites]
        return 1.0 - self._gated_share * (1.0 - sum(density) / len(density))

    def _compare_ranks(self, parts: dict[str, float]) -> tuple[dict[str, float], Slowest | None]:
        """Norms over all ranks, the largest memory, and how far the slowest is behind; who it is, if that is much.

        `optim/update_ratio` is ‖Δθ‖ / ‖θ‖ of the window's last step, θ after it (`Engine.squared_norms`).
        `time/rank_spread` is the slowest rank's own work over the mean, from 1; own work is forward and backward up
        to the last gradient. That tells a slow device or host apart at ZeRO 0 and 1. At ZeRO 2 with gradients beyond
        one bucket, and at ZeRO 3, ranks wait for each other in between, and the spread comes out too small.
        """
        mine = (parts["forward"] + parts["backward"], *self._engine.squared_norms(), *_memory_gib(self._ranks.device))
        work, theta, update, memory, peak, host = zip(*self._ranks.gather(mine), strict=True)
        values: dict[str, float] = {
            PARAM_NORM: sum(theta) ** 0.5,
            MEMORY: max(memory),
            PEAK_MEMORY: max(peak),
            HOST_MEMORY: max(host),
        }
        if None not in update:
            values[UPDATE_RATIO] = (sum(update) / sum(theta)) ** 0.5
        if self._ranks.world_size == 1:
            return values, None
        values[RANK_SPREAD] = ratio = max(work) * len(work) / sum(work)
        rank = work.index(max(work))
        return values, Slowest(rank, self._hosts[rank], ratio) if ratio > SLOW else None

    def _health(self, step: int) -> dict[str, float]:
        """`health/skipped` counts the steps of the whole run that applied no update, once there is one."""
        values: dict[str, float] = {RESTARTS: float(self._restarts)}
        if skipped := step - self._engine.optimizer_steps:
            values[STEPS_SKIPPED] = float(skipped)
        return values


def _rows(names: Iterable[str], table: Tensor) -> list[dict[str, float]]:
    return [dict(zip(names, row, strict=True)) for row in table.tolist()]


def _named(row: dict[str, float], *, of_a_mask: bool) -> dict[str, float]:
    """By the journal's names: the metrics of single masks, such as `density/enc_ff/0`, or all others."""
    return {of_model(name): value for name, value in row.items() if ("/" in name) == of_a_mask}


def _memory_gib(device: torch.device) -> tuple[float, float, float]:
    """Now and at most, and the process's resident memory, in GiB; the first two are torch's allocations on a GPU."""
    host = psutil.Process().memory_info().rss / 2**30
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.max_memory_allocated(device) / 2**30, host
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux, which counts a little behind
    return host, max(host, peak_kib / 2**20), host
