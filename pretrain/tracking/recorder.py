"""All that rank 0 writes about a run: journal, MLflow, terminal, report. Silent on the other ranks."""

import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from data_pipeline.secret import redact
from data_pipeline.storage.manifest import Manifest
from model.config.transformer import TransformerConfig
from model.masks.bistability import warnings_for
from pretrain import status_line
from pretrain.config.schema import Config
from pretrain.engine.distributed import Ranks
from pretrain.metric_names import (
    BITS_PER_BYTE,
    CHECKPOINT_MS,
    LOSS,
    ROLLBACKS,
    SPIKES,
    STEPS_SKIPPED,
    TOKENS_PER_SECOND,
    VALIDATION,
)
from pretrain.report import report
from pretrain.run import provenance
from pretrain.run.checkpoint_folder import complete
from pretrain.run.job_records import JobFolder, this_job
from pretrain.run.journal import Journal
from pretrain.run.lease import LeaseLost
from pretrain.run.run_folder import RunFolder
from pretrain.run.run_summary import RunData, label_scores_told, load
from pretrain.run.signals import BrokenOff, StopRequest, exit_code, told
from pretrain.tracking.console import Console, log_traceback
from pretrain.tracking.follower import Follows, Tracker, assign, unsent
from pretrain.tracking.metrics import StepMetrics
from pretrain.tracking.mlflow_state import State
from pretrain.tracking.mlflow_sync import Mirror
from pretrain.tracking.tensorboard import EventFiles, check_installed
from pretrain.tracking.webhook import Webhook

T = TypeVar("T")
COUNTED = {STEPS_SKIPPED: "steps without an update", SPIKES: "loss spikes", ROLLBACKS: "rollbacks"}
"""What the summary tells of a run's health."""
ASLEEP_SECONDS = 60.0
"""MLflow waits for the first step's record at most: to import it takes as long as importing torch."""
CLOSE_SECONDS = 10.0
CLOSE_SECONDS_AFTER_SIGNAL = 2.0


class Recorder:
    """Use as a context: leaving it writes how the attempt ended, also when that was an error."""

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks, attempt: int) -> None:
        self.attempt = attempt
        self.commit: str | None = None
        """Of the source, on rank 0 from the start on; None outside a checkout."""
        self._config = config
        self._folder = folder
        self._active = ranks.is_first
        self._world_size = ranks.world_size
        self._ended = False
        self._tracker: Tracker | None = None
        self._others: list[Tracker] = []
        """Of TensorBoard and the webhook."""
        self._mlflow = ""
        self._sample = ""
        self._slowest_rank: int | None = None
        if self._active:
            self._first_step = 0
            self._journal = Journal(folder.journal, attempt)
            self._console = Console(config.train.steps)

    def start(self, step: int, facts: dict[str, Any], num_rollbacks: int = 0) -> None:
        """The attempt begins after `step` (0: from scratch), and after so many rollbacks of the run."""
        if not self._active:
            return
        config = self._config
        self._first_step = step
        self._folder.describe(**facts)
        self._journal.num_rollbacks = num_rollbacks
        self._follow_elsewhere()  # from here on
        self._journal.event(
            "start", resumed_from=step or None, config=config.model_dump(mode="json"), tags=self._tags(), **facts
        )
        begun = "from scratch" if config.finetune.kind == "none" else f"with the weights of {config.run.start_from}"
        self._console.note(
            f"run {config.run.name}: {facts['parameters']:,} parameters, {config.batch.tokens:,} tokens a step, "
            f"{facts['world_size']} rank(s), ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
            + (f"resumed from step {step}" if step else begun)
        )
        if isinstance(config.model, TransformerConfig):
            for warning in warnings_for(config.model.learned_dropout, config.optimizer.lr):
                self.warning(warning)
        tracking = config.tracking
        if tracking.mode != "off":
            self._mlflow = assign(
                self._folder.path,
                uri=tracking.uri,
                experiment=tracking.experiment,
                run_name=config.run.name,
                all_masks=tracking.masks == "all",
                warn=self.warning,
            )
        if tracking.mode == "online":
            self._tracker = Tracker(partial(Mirror, self._folder.path), self.warning)
            self._tracker.start(asleep=ASLEEP_SECONDS)

    def _follow_elsewhere(self) -> None:
        """Raises ConfigError or RunError when it cannot."""
        tracking, path = self._config.tracking, self._folder.path
        mirrors: list[Follows] = []
        if tracking.tensorboard:
            check_installed("tracking.tensorboard")
            mirrors.append(EventFiles(path, all_masks=tracking.masks == "all"))
        if tracking.webhook:
            mirrors.append(Webhook(path, self._config.run.name, tracking.webhook))
        self._others = [Tracker(lambda _, mirror=mirror: mirror, self.warning) for mirror in mirrors]  # type: ignore[misc]
        for tracker in self._others:
            tracker.start()

    def note(self, text: str) -> None:
        """Something the user may want to know."""
        if self._active:
            self._console.note(text)

    def steps(self, lines: list[StepMetrics]) -> None:
        """Journal each step; show the last one, with losses averaged over all of them."""
        if not self._active or not lines:
            return
        for line in lines:
            self._journal.metrics(line.step, line.values)
            if line.slowest and line.slowest.rank != self._slowest_rank:  # news
                self._slowest_rank = line.slowest.rank
                self._journal.event("slowest", step=line.step, **asdict(line.slowest))
        shown = dict(lines[-1].values)
        for name in shown:
            if name in lines[0].values and name.startswith(("loss/", "penalty/", "gate/")):
                shown[name] = sum(line.values[name] for line in lines) / len(lines)
        self._console.step(lines[-1].step, shown)
        if self._tracker:
            self._tracker.wake()

    def validating(self, step: int, done: int, total: int) -> None:
        """A validation is under way: so many of its batches are done."""
        if self._active:
            self._console.validating(step, done, total)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Results of a validation."""
        if self._active:
            self._journal.metrics(step, metrics)
            self._console.validation(step, metrics)

    def sample(self, step: int, text: str) -> None:
        """A generated text."""
        if self._active:
            self._sample = text
            self._journal.event("sample", step=step, text=text)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint is complete, after `seconds`; what the journal says up to here is on disk, too."""
        if self._active:
            self._journal.metrics(step, {CHECKPOINT_MS: 1e3 * seconds})
            self._journal.event("checkpoint", step=step, path=str(path.relative_to(self._folder.path)))
            self._journal.sync()

    def sync_journal(self) -> None:
        """Have on disk what the journal says up to here."""
        if self._active:
            self._journal.sync()

    def profile(self, step: int, path: Path) -> None:
        """A trace, or a memory snapshot, that begins with this step is written."""
        if self._active:
            self._journal.event("profile", step=step, path=str(path.relative_to(self._folder.path)))

    def warning(self, text: str) -> None:
        """Something the user should know."""
        if self._active:
            self._journal.event("warning", text=text)
            self._console.warning(text)

    def health(self, kind: str, step: int, text: str, **facts: Any) -> None:
        """Something the run noticed about itself: a kind of `journal.HEALTH`, or a rollback; `facts` are JSON."""
        if self._active:
            self._journal.event(kind, step=step, text=text, **facts)
            self._console.warning(text)

    def rollback(self, step: int, to: int, text: str, data: dict[str, Any]) -> None:
        """Training goes back from `step` to the checkpoint of step `to`, and on with the data at `data`."""
        if self._active:
            self.health("rollback", step, text, resumed_from=to, data=data)
            self._journal.num_rollbacks += 1
            self._journal.sync()

    def finish(self, step: int, request: int, seconds: float, stop: StopRequest) -> None:
        """The loop is over: all steps done, or stopped on request (`pretrain.run.signals`) after a save.

        Once the end is recorded, nothing that fails, takes long or is broken off makes a failure of the run.
        """
        if not self._active:
            stop.ended(request)
            return
        status, reason = ("KILLED", told(request)) if request else ("FINISHED", "all steps done")
        try:
            self._end(status, reason, code=exit_code(request))
        except OSError as error:  # a full disk; what was learned is saved
            self._console.warning(f"the run is over and saved, but its end could not be recorded: {error}")
        stop.ended(request)
        self._console.summary(self._last_words(step, request, seconds, stop))

    def _last_words(self, step: int, request: int, seconds: float, stop: StopRequest) -> list[tuple[str, str]]:
        """Write the report, close MLflow; the summary."""
        path = self._folder.path
        data = self._afterwards(stop, "its journal", lambda: load(path))
        # A job that Slurm takes its nodes from has no time for pictures, and none of them waits for these.
        hurried = request in (signal.SIGUSR1, signal.SIGTERM) and this_job()[0] is not None
        written = data and not hurried and self._afterwards(stop, "the report", lambda: self._report(data))
        timeout = 0.0 if stop.broken_off else CLOSE_SECONDS_AFTER_SIGNAL if request else CLOSE_SECONDS
        shipped = self._afterwards(stop, "MLflow", lambda: self._close_tracker(timeout))
        if self._sample:
            self._console.note(f"sample: {self._sample}")
        again = f"left out; `{_command('duet', 'report', path)}` makes it"
        made = str(self._folder.report) if written else again
        rows = None
        if data:
            summary = partial(self._summary, data, step, request, seconds, made, bool(shipped))
            rows = self._afterwards(stop, "the summary", summary)
        return rows or [("run", f"{self._config.run.name}: step {step}"), ("report", made)]

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if error is not None and not self._ended and not isinstance(error, LeaseLost):
            self._end("FAILED", redact(f"{type(error).__name__}: {error}"))
            if not self._close_tracker(CLOSE_SECONDS_AFTER_SIGNAL) and self._mlflow:
                self._console.note(f"MLflow: {self._late()}")
        self._journal.close()
        self._console.close()

    def _end(self, status: str, reason: str, **more: Any) -> None:
        self._journal.event("end", status=status, reason=reason, **more)
        self._journal.sync()
        self._ended = True

    def _report(self, data: RunData) -> bool:
        report.write([data], self._folder.report)
        return True

    def _afterwards(self, stop: StopRequest, what: str, work: Callable[[], T]) -> T | None:
        """Do what may fail, or be broken off, without harm; None when it did."""
        try:
            with stop.breakable(), status_line.doing(f"the run is over and saved; {what}"):
                return work()
        except (Exception, BrokenOff) as error:
            log_traceback()
            why = str(error) if isinstance(error, BrokenOff) else f"{type(error).__name__}: {error}"
            self._console.warning(f"the run is over and saved, but {what} was not to be had: {why}")
            return None

    def _close_tracker(self, timeout: float) -> bool:
        """All mirrors, within the same time; whether MLflow has all."""
        end = time.monotonic() + timeout
        every = [*([self._tracker] if self._tracker else []), *self._others]
        for tracker in every:
            tracker.close_soon()
        done = {tracker: tracker.close(max(0.0, end - time.monotonic())) for tracker in every}
        for tracker in self._others:
            if not done[tracker]:
                self._console.note(f"{tracker.called} does not have all of the run")
        return self._tracker is not None and done[self._tracker]

    def _late(self) -> str:
        path = self._folder.path
        return f"{unsent(path)}; this sends them: {_command('duet', 'track', 'sync', path)}"

    def _tags(self) -> dict[str, str]:
        """What this attempt is made of, in short."""
        manifest = Manifest.load(self._config.data.path)
        source = provenance.record(self._folder.path / "code", self.attempt)
        self.commit = source.get("git/commit")
        return {
            "dataset/fingerprint": manifest.fingerprint,
            "dataset/tokenizer": manifest.tokenizer.sha256,
        } | source

    def _summary(
        self, data: RunData, step: int, request: int, seconds: float, made: str, shipped: bool
    ) -> list[tuple[str, str]]:
        config, path = self._config, self._folder.path
        points = data.points
        rows = [("run", f"{config.run.name}: step {step} of {config.train.steps}" + (" (stopped)" if request else ""))]
        if loss := points.get(LOSS):
            rows.append(("loss", f"{loss[0].value:.4f} → {loss[-1].value:.4f} nats/{data.counted}"))
        if bits := points.get(BITS_PER_BYTE):
            order0 = data.order0_entropy
            beside = "" if order0 is None else f" (order-0 entropy of that text: {order0:.4f})"
            rows.append(("validation", f"{bits[-1].value:.4f} bits/byte{beside}"))
        elif loss := points.get(VALIDATION):
            rows.append(("validation", f"{loss[-1].value:.4f} nats/label"))
        if scores := label_scores_told(data):
            rows.append(("labels", scores))
        steps = step - self._first_step
        if steps:
            rate = points[TOKENS_PER_SECOND][-1].value
            rows.append(("speed", f"{rate:,.0f} tokens/s; {steps} steps in {seconds:.0f} s, start-up included"))
        counts = {metric: int(points[metric][-1].value) for metric in COUNTED if points.get(metric)}
        if told := [f"{COUNTED[name]}: {count}" for name, count in counts.items() if count]:
            rows.append(("health", f"{', '.join(told)}; see the report"))
        if saved := complete(self._folder.checkpoints):
            rows.append(("checkpoint", str(saved[0])))
        rows.append(("report", made))
        if self._mlflow:
            state = State.load(path)
            page = (state and state.page(path)) or self._mlflow
            rows.append(("mlflow", page + ("" if shipped else f" ({self._late()})")))
            if self._mlflow.startswith("sqlite"):
                rows.append(("served by", _command("mlflow", "ui", "--backend-store-uri", self._mlflow)))
        submitted = JobFolder(path).submissions()
        again = ["resume", path] if submitted else ["train", self._folder.config_file, "--ranks", self._world_size]
        rows.append(("resume", _command("duet", *again)))
        return rows


def _command(name: str, *words: object) -> str:
    """A call of a program of this environment, for the shell that the user is in."""
    return shlex.join([_program(name), *map(str, words)])


def _program(name: str) -> str:
    """How to call a program of this environment from the shell the user is in."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
