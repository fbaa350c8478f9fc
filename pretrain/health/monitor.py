"""A run that watches itself: what it notices, what it says, and when it skips, goes back or ends."""

import gc
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from data_pipeline.errors import RunError
from data_pipeline.sampling.data_state import DataState
from model.batch import Batch
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine, Guard
from pretrain.health.nonfinite import Diagnosis, diagnose
from pretrain.health.rollback import Past
from pretrain.health.spikes import Spike, StepLoss
from pretrain.health.trends import Closed, Growth, Straggler
from pretrain.health.watchdog import Watchdog
from pretrain.metric_names import DENSITY, GRAD_NORM, HOST_MEMORY, LOSS, MEMORY, SAMPLES_SEEN, SKIPPED, SPIKES
from pretrain.run.journal import DIVERGED
from pretrain.tracking.metrics import StepMetrics
from pretrain.tracking.recorder import Recorder

GROWS = {MEMORY: "memory of the device", HOST_MEMORY: "memory of the process"}


class Health:
    """Use as a context around the training loop, on every rank; what it decides is the same on all of them.

    Good steps cost nothing but, with `health.on_spike=skip`, one reduction of a number on the device. All else is
    decided from values that logging fetches anyway, or after a step was skipped.
    """

    def __init__(
        self, config: Config, ranks: Ranks, engine: Engine, recorder: Recorder, logs: Path, past: Past
    ) -> None:
        self.num_rollbacks = past.num_rollbacks
        """Of the whole run."""
        self.spike: Spike | None = None
        """Of the last window: what the run has to be rolled back for."""
        self.guard: Guard | None = self._nan_if_spiked if config.health.on_spike == "skip" else None
        """For the engine's steps."""
        self._config = config.health
        self._global_batch = config.global_batch
        self._ranks = ranks
        self._engine = engine
        self._recorder = recorder
        self._past = past
        self._watchdog = Watchdog(logs, ranks.rank, 60 * config.hang_minutes, self._hangs)
        self._stack = ExitStack()
        self._in_a_row = 0
        self._first: Diagnosis | None = None
        """Of the first step that was not finite since the last good one."""
        self._diagnoses: list[Diagnosis] = []
        """Of this window."""
        self._guarded: Tensor | None = None
        self._last_finite = "none"
        self._straggler = Straggler()
        self._closed = Closed()
        self._growth = {name: Growth(what) for name, what in GROWS.items()}
        if ranks.device.type == "cpu":  # they are the same there
            del self._growth[MEMORY]

    @property
    def too_many_skipped(self) -> bool:
        """Whether the next `record` ends the run."""
        return self._in_a_row >= self._config.max_skipped

    def beat(self) -> None:
        """There is progress, such as a validation or a checkpoint."""
        self._watchdog.beat()

    def after_step(self, step: int, micro_batches: Sequence[Batch], lr: float, applied: bool) -> None:
        """A step is done: all ranks collect garbage at the same one, and look closer at one that was skipped."""
        self._watchdog.beat(step)
        if step % self._config.gc_every == 0:
            gc.collect()
        if applied:
            self._in_a_row, self._first = 0, None
            return
        self._in_a_row += 1
        if self._first is None and not self._guard_struck():
            self._first = diagnose(step, micro_batches, lr, self._engine, self._ranks)
            self._diagnoses.append(self._first)

    def record(self, lines: list[StepMetrics]) -> None:
        """Judge a window of steps, journal it, and say what is wrong with it; sets `spike`.

        Raises:
            RunError: too many steps in a row were skipped; says where it began.
        """
        spikes = self._past.spikes.judge(
            StepLoss(line.step, line.values[LOSS], SKIPPED not in line.values) for line in lines
        )
        self._past.num_spikes += len(spikes)
        if lines and self._past.num_spikes:
            values = lines[-1].values | {SPIKES: float(self._past.num_spikes)}
            lines = [*lines[:-1], replace(lines[-1], values=values)]
        self._recorder.steps(lines)
        self.spike = spikes[-1] if spikes and self._config.on_spike == "rollback" else None
        if lines:
            self._tell_skipped(lines)
            self._tell_spikes(spikes, lines)
            self._tell_trends(lines[-1])
        if self.too_many_skipped:
            raise RunError(self._why_it_ends(lines[-1].step))

    def rolled_back(self, step: int, to: int | None, data: DataState) -> None:
        """Because of `spike` the run stands at step `to` again (None: there is no checkpoint); seen at `step`."""
        assert self.spike
        spike, self.spike = self.spike, None
        if to is None:
            self._recorder.health("spike", step, "there is no checkpoint to go back to: training goes on", spikes=[])
            return
        self.num_rollbacks += 1
        self._past.spikes.rewind(to)
        text = (
            f"rolled back from step {step} to the checkpoint of step {to}, because the loss was {spike.loss:.4f} at "
            f"step {spike.step}; the data read since are passed over, up to sample {data.samples_seen} (rollback "
            f"{self.num_rollbacks} of at most {self._config.max_rollbacks})"
        )
        self._recorder.rollback(step, to, text, data.model_dump())

    def check_may_roll_back(self) -> None:
        """Raises RunError when the run has been rolled back too often."""
        if self.spike and self.num_rollbacks >= self._config.max_rollbacks:
            raise RunError(
                f"the loss spiked again, to {self.spike.loss:.4f} at step {self.spike.step} ({self.spike.z:.1f} robust "
                f"deviations above the median {self.spike.median:.4f}), after {self.num_rollbacks} rollback(s): it is "
                "not the data; start a new run with a lower optimizer.lr or a longer schedule.warmup_steps, or go on "
                "with a larger health.max_rollbacks or with health.on_spike=warn"
            )

    def __enter__(self) -> "Health":
        self._stack.enter_context(self._watchdog)
        forward = self._engine.module.register_forward_hook(lambda *_: self._watchdog.beat())
        self._stack.callback(forward.remove)
        if gc.isenabled():
            self._stack.callback(gc.enable)
        gc.collect()
        gc.freeze()  # what is there now stays: nothing to look through again
        self._stack.callback(gc.unfreeze)
        gc.disable()  # else each rank stops at a step of its own, and the others wait for it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _nan_if_spiked(self, metrics: list[dict[str, Tensor]]) -> Tensor:
        """NaN when the step's loss, over all ranks, is a spike; else 1. Nothing waits for the device."""
        mean = self._ranks.mean_on_device(torch.stack([of_one["cross_entropy"].float() for of_one in metrics]).mean())
        spiked = (mean > self._past.spikes.limit) & mean.isfinite()
        self._guarded = torch.where(spiked, math.nan, 1.0)
        return self._guarded

    def _guard_struck(self) -> bool:
        return self._guarded is not None and bool(self._ranks.largest(int(self._guarded.isnan()))[0])

    def _hangs(self, step: int, text: str) -> None:
        self._recorder.health("hang", step, text)
        if not self._ranks.is_first:
            print(f"warning: {text}", file=sys.stderr)

    def _tell_skipped(self, lines: list[StepMetrics]) -> None:
        for line in lines:
            loss, norm = line.values[LOSS], line.values[GRAD_NORM]
            if math.isfinite(loss) and math.isfinite(norm):
                self._last_finite = f"loss {loss:.4f} and gradient norm {norm:.4g} at step {line.step}"
        skipped = [line.step for line in lines if SKIPPED in line.values]
        if skipped:
            text = f"{len(skipped)} of {len(lines)} step(s) up to step {lines[-1].step} applied no update"
            for diagnosis in self._diagnoses[:1]:
                text += f"; not finite at {diagnosis}; last finite: {self._last_finite}"
            facts = [diagnosis.facts() for diagnosis in self._diagnoses]
            self._recorder.health("skipped", lines[-1].step, text, steps=skipped, diagnoses=facts)
        self._diagnoses.clear()

    def _tell_spikes(self, spikes: list[Spike], lines: list[StepMetrics]) -> None:
        if not spikes:
            return
        worst = max(spikes, key=lambda spike: spike.loss)
        end = next(int(line.values[SAMPLES_SEEN]) for line in lines if line.step == worst.step)
        text = (
            f"loss spike at step {worst.step}, samples {end - self._global_batch} to {end - 1}: {worst.loss:.4f} is "
            f"{worst.z:.1f} robust deviations above the recent median {worst.median:.4f}"
        )
        if len(spikes) > 1:
            text += f"; {len(spikes)} spikes from step {spikes[0].step} to {spikes[-1].step}"
        if self._config.on_spike == "skip":
            text += "; no update was applied"
        self._recorder.health("spike", worst.step, text, spikes=[spike._asdict() for spike in spikes])

    def _tell_trends(self, last: StepMetrics) -> None:
        if text := self._straggler.after(last.slowest):
            self._recorder.health("straggler", last.step, text)
        if text := self._closed.after({site: last.values[DENSITY.of(site)] for site in self._engine.gated_sites}):
            self._recorder.health("closed", last.step, text)
        for name, growth in self._growth.items():
            if text := growth.after(last.values[name]):
                self._recorder.health("growth", last.step, text)

    def _why_it_ends(self, step: int) -> str:
        count = self._in_a_row
        if self._first is None:
            return (
                f"the loss was a spike {count} steps in a row, up to step {step}, and their updates were left out: "
                f"{DIVERGED}, or its data have changed; last finite: {self._last_finite}; go on with "
                "health.on_spike=warn, or with a larger health.spike_z"
            )
        return (
            f"the gradients were not finite {count} steps in a row, up to step {step}: {DIVERGED}\n"
            f"  first at {self._first}\n  last finite: {self._last_finite}\n  {self._first.advice()}"
        )
