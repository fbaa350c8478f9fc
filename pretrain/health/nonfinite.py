"""Where a loss or a gradient that is not finite came from: found after the step was skipped, by computing it again."""

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.batch import Batch
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine

NAMES_SHOWN = 3
SAMPLES_SHOWN = 8


@dataclass(frozen=True)
class NotFinite:
    """The first micro-batch of a rank with a loss or a gradient that is not finite."""

    rank: int
    host: str
    micro_batch: int
    """From 1."""
    samples: list[int]
    """Positions in the data order."""
    loss: float
    parameters: list[str]
    """Whose gradients are not finite, in the model's order."""

    def __str__(self) -> str:
        names = _some(self.parameters, NAMES_SHOWN)
        return (
            f"rank {self.rank} on {self.host}, micro-batch {self.micro_batch}, samples "
            f"{_some(list(map(str, self.samples)), SAMPLES_SHOWN)}: loss {self.loss:.6g}, "
            + (f"gradients not finite in {len(self.parameters)} parameter(s): {names}" if names else "finite gradients")
        )


@dataclass(frozen=True)
class Diagnosis:
    """What a step that was skipped shows when it is computed again; the same on every rank."""

    step: int
    findings: list[NotFinite]
    """Of the ranks that have something to show, in their order."""
    num_ranks: int

    def __str__(self) -> str:
        if not self.findings:
            return (
                f"step {self.step}: computed again, the losses and gradients of every rank are finite, so their sum "
                "overflowed or a device erred once"
            )
        others = len(self.findings) - 1
        return f"step {self.step}: {self.findings[0]}" + (f"; and {others} other rank(s)" if others else "")

    def advice(self) -> str:
        """What to change."""
        if not self.findings:
            return "lower optimizer.lr; if it comes from one host only, have its memory and devices tested"
        if len(self.findings) < self.num_ranks:
            return "look at those samples, and have that rank's device tested; then go on, or lower optimizer.lr"
        return "every rank has it: start a new run with a lower optimizer.lr, or a longer schedule.warmup_steps"

    def facts(self) -> dict[str, Any]:
        """For the journal: strict JSON."""
        return {"step": self.step, "findings": [asdict(f) | {"loss": str(f.loss)} for f in self.findings]}


def diagnose(step: int, micro_batches: Sequence[Batch], lr: float, engine: Engine, ranks: Ranks) -> Diagnosis:
    """Compute a skipped step again and see which rank, micro-batch and parameters it is; a collective."""
    losses, finite = engine.replay(micro_batches, lr)
    mine = None
    for index, batch in enumerate(micro_batches):
        loss = float(losses[index])
        flags = [(name, flag[index]) for name, flag in finite.items() if flag]
        good = torch.stack([flag for _, flag in flags]).tolist()
        parameters = [name for (name, _), is_good in zip(flags, good, strict=True) if not is_good]
        if parameters or not math.isfinite(loss):
            mine = NotFinite(ranks.rank, platform.node(), index + 1, batch.samples.tolist(), loss, parameters)
            break
    return Diagnosis(step, [found for found in ranks.gather(mine) if found], ranks.world_size)


def _some(words: list[str], count: int) -> str:
    return ", ".join(words[:count]) + (f", … ({len(words)})" if len(words) > count else "")
