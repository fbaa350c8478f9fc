"""Runs in which something goes wrong on purpose; started through the fixture `ranks`."""

import ctypes
import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.batch import Batch
from pretrain import trainer
from pretrain.config.schema import load
from pretrain.engine.distributed import Ranks
from pretrain.health import monitor, trends
from pretrain.health.nonfinite import Diagnosis
from pretrain.health.watchdog import Watchdog
from pretrain.run.job_records import FailureFile
from pretrain.run.signals import StopRequest
from pretrain.tracking import recorder
from tests.distributed.cases import without_report


def train(ranks: Ranks, args: list[str]) -> list[tuple[str, str]]:
    """A whole run but for the report at its end. Returns the summary."""
    summary: list[tuple[str, str]] = []
    without_report()
    recorder.Console.summary = lambda self, rows: summary.extend(rows)  # type: ignore[method-assign]
    trainer.train(load(args), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
    return summary


def run(
    ranks: Ranks,
    args: list[str],
    spike: tuple[int, ...] = (),
    nan_loss: tuple[int, ...] = (),
    nan_gradient: tuple[int, ...] = (),
    killed_by: int | None = None,
    sabotage: str | None = None,
) -> list[tuple[str, str]]:
    """A run in which single samples, by their position in the data, do harm wherever they are computed.

    They make the logits a hundred times as large, or nan, or the gradient of the last norm nan, or kill the rank.
    """
    poisoned = False

    def meets(samples: tuple[int, ...], batch: Batch) -> bool:
        return bool(set(samples) & set(batch.samples.tolist()))

    factor, build = 1.0, registry.build

    def look(model: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal poisoned, factor
        factor = 1.0
        if model.training:
            (batch,) = args
            if killed_by in batch.samples.tolist():
                os.kill(os.getpid(), signal.SIGKILL)
            poisoned = meets(nan_gradient, batch)
            factor = (100.0 if meets(spike, batch) else 1.0) * (torch.nan if meets(nan_loss, batch) else 1.0)

    def scale_logits(head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0] * factor, *args[1:]) if args[0].is_floating_point() else None

    def build_poisoned(config: Any) -> TokenModel:
        model = build(config)
        model.register_forward_pre_hook(look)
        model.token_embed.register_forward_pre_hook(scale_logits)
        model.get_parameter("final_norm.weight").register_hook(
            lambda gradient: gradient * torch.nan if poisoned else None
        )
        return model

    registry.build = build_poisoned
    if sabotage == "look at nothing again":
        monitor.diagnose = lambda step, *rest: Diagnosis(step, [], ranks.world_size)
    elif sabotage == "go back but keep the weights":
        trainer.load_older = lambda root, back, *rest: int(
            sorted(root.glob("step-*"))[-back].name.removeprefix("step-")
        )
    return train(ranks, args)


def collections(ranks: Ranks, args: list[str]) -> dict[str, Any]:
    """At which steps garbage was collected, however that came about, and the collector's state before and after."""
    steps: list[int] = []
    after_step = monitor.Health.after_step
    now = 0
    inside = False

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and inside:
            steps.append(now)

    def noted(self: monitor.Health, step: int, *rest: Any) -> None:
        nonlocal now, inside
        now, inside = step, step < 12
        after_step(self, step, *rest)

    monitor.Health.after_step = noted  # type: ignore[method-assign,assignment]
    gc.callbacks.append(note)
    before = gc.isenabled()
    train(ranks, args)
    return {"steps": steps, "before": before, "after": gc.isenabled(), "frozen": gc.get_freeze_count()}


def frozen(ranks: Ranks, args: list[str], at: int, thaw: bool) -> str:
    """Rank 1 is stopped (SIGSTOP) after a step, and goes on when rank 0 has written where it waits; or never.

    A machine that is slow may look like a hang in another step, too.

    Returns:
        what rank 0 has written of its stacks.
    """
    pids = ranks.gather(os.getpid())
    logs = load(args).run_dir / "logs"
    after_step = monitor.Health.after_step

    def stop(self: monitor.Health, step: int, *rest: Any) -> None:
        after_step(self, step, *rest)
        if step == at and not thaw:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
        if step == at and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    def written() -> str:
        return "".join(file.read_text() for file in sorted(logs.glob("stacks-rank-0-*")))

    def is_stopped() -> bool:
        return Path(f"/proc/{pids[1]}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def wait_and_thaw() -> None:
        while not ("agreed_request" in written().partition(f"after step {at}")[2] and is_stopped()):
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGCONT)

    monitor.Health.after_step = stop  # type: ignore[method-assign,assignment]
    if thaw and ranks.rank == 0:
        threading.Thread(target=wait_and_thaw, daemon=True).start()
    try:
        train(ranks, args)
    finally:
        if ranks.rank == 0 and not thaw:
            os.kill(pids[1], signal.SIGKILL)
    return written()


def never_gives_the_lock_away(ranks: Ranks, logs: str) -> list[str]:
    """The main thread stays in a C function that keeps Python's lock, until the timer that needs none has written."""
    del ranks
    log = Path("/proc/self/fd/2").resolve()
    with Watchdog(Path(logs), 0, 0.4, lambda step, text: None) as watchdog:
        while "Timeout (" not in log.read_text():  # once is enough, unless the machine stands still just then
            watchdog.beat()
            time.sleep(0.1)
            ctypes.PyDLL(None).usleep(900_000)
    assert "never_gives_the_lock_away" in log.read_text()
    return []


def leaking(ranks: Ranks, args: list[str], slow: float, leak_mib: int) -> list[tuple[str, str]]:
    """Rank 1 takes `slow` seconds more for each forward pass and keeps some memory after each step."""
    kept: list[bytes] = []
    after_step, original = monitor.Health.after_step, TokenModel.hidden

    def leak(self: monitor.Health, *rest: Any) -> None:
        after_step(self, *rest)
        kept.append(os.urandom(1 << 20) * leak_mib if ranks.rank == 1 else b"")

    def hidden(model: TokenModel, *rest: Any) -> Any:
        time.sleep(slow if ranks.rank == 1 else 0.0)
        return original(model, *rest)

    trends.SLOW_SECONDS = 0.0
    monitor.Health.after_step = leak  # type: ignore[method-assign,assignment]
    TokenModel.hidden = hidden  # type: ignore[method-assign,assignment]
    return train(ranks, args)
