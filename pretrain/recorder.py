"""All that rank 0 tells the world about a run: journal, MLflow, terminal, report. Silent on the other ranks."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.manifest import Manifest
from model.bistability import warnings_for
from pretrain import provenance, report
from pretrain.checkpoint_folder import complete
from pretrain.config import Config
from pretrain.console import Console
from pretrain.distributed import Ranks
from pretrain.job import JobFolder
from pretrain.journal import Journal
from pretrain.lease import LeaseLost
from pretrain.metrics import StepMetrics
from pretrain.report_data import RunData, load
from pretrain.run import RunFolder
from pretrain.signals import told
from pretrain.tracking import Tracker, assign

COUNTED = {"skipped": "steps without an update", "spikes": "loss spikes", "rollbacks": "rollbacks"}
"""What the summary tells of `health/…`."""
CLOSE_SECONDS = 10.0
CLOSE_SECONDS_AFTER_SIGNAL = 2.0


class Recorder:
    """Use as a context: leaving it writes how the attempt ended, also when that was an error."""

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks, attempt: int) -> None:
        self.attempt = attempt
        self._config = config
        self._folder = folder
        self._active = ranks.is_first
        self._ended = False
        self._tracker: Tracker | None = None
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
        self._journal.event(
            "start", resumed_from=step or None, config=config.model_dump(mode="json"), tags=self._tags(), **facts
        )
        self._console.note(
            f"run {config.run.name}: {facts['parameters']:,} parameters, {config.batch.tokens:,} tokens a step, "
            f"{facts['world_size']} rank(s), ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
            + (f"resumed from step {step}" if step else "from scratch")
        )
        for warning in warnings_for(config.model.learned_dropout, config.optimizer.lr):
            self.warning(warning)
        tracking = config.tracking
        if tracking.mode != "off":
            self._mlflow = assign(
                self._folder.path, uri=tracking.uri, experiment=tracking.experiment, run_name=config.run.name
            )
        if tracking.mode == "online":
            self._tracker = Tracker(self._folder.path, self.warning)
            self._tracker.start()

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
            self._journal.metrics(step, {"time/checkpoint_ms": 1e3 * seconds})
            self._journal.event("checkpoint", step=step, path=str(path.relative_to(self._folder.path)))
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

    def finish(self, step: int, request: int, seconds: float) -> None:
        """The loop is over: all steps done, or stopped on request (`pretrain.signals`) after a save."""
        if not self._active:
            return
        self._end("KILLED" if request else "FINISHED", told(request) if request else "all steps done")
        data = load(self._folder.path)
        report.write([data], self._folder.report)
        shipped = self._close_tracker(CLOSE_SECONDS_AFTER_SIGNAL if request else CLOSE_SECONDS)
        if self._sample:
            self._console.note(f"sample: {self._sample}")
        self._console.summary(self._summary(data, step, request, seconds, shipped))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if error is not None and not self._ended and not isinstance(error, LeaseLost):
            self._end("FAILED", f"{type(error).__name__}: {error}")
            self._close_tracker(CLOSE_SECONDS_AFTER_SIGNAL)
        self._journal.close()
        self._console.close()

    def _end(self, status: str, reason: str) -> None:
        self._journal.event("end", status=status, reason=reason)
        self._journal.sync()
        self._ended = True

    def _close_tracker(self, timeout: float) -> bool:
        return self._tracker.close(timeout) if self._tracker else False

    def _tags(self) -> dict[str, str]:
        """What this attempt is made of, in short."""
        manifest = Manifest.load(self._config.data.path)
        return {
            "dataset/fingerprint": manifest.fingerprint,
            "dataset/tokenizer": manifest.tokenizer.sha256,
        } | provenance.record(self._folder.path / "code", self.attempt)

    def _summary(self, data: RunData, step: int, request: int, seconds: float, shipped: bool) -> list[tuple[str, str]]:
        config, path = self._config, self._folder.path
        points, facts = data.points, data.facts
        rows = [("run", f"{config.run.name}: step {step} of {config.train.steps}" + (" (stopped)" if request else ""))]
        if loss := points.get("loss/train"):
            rows.append(("loss", f"{loss[0].value:.4f} → {loss[-1].value:.4f} nats/token"))
        if bits := points.get("loss/val_bits_per_byte"):
            order0 = facts["dataset"]["order0_entropy"]
            rows.append(("validation", f"{bits[-1].value:.4f} bits/byte (order-0 entropy of that text: {order0:.4f})"))
        elif loss := points.get("loss/val"):
            rows.append(("validation", f"{loss[-1].value:.4f} nats/label"))
        steps = step - self._first_step
        if steps:
            rate = points["time/tokens_per_second"][-1].value
            rows.append(("speed", f"{rate:,.0f} tokens/s; {steps} steps in {seconds:.0f} s, start-up included"))
        counts = {name: int(points[f"health/{name}"][-1].value) for name in COUNTED if points.get(f"health/{name}")}
        if told := [f"{COUNTED[name]}: {count}" for name, count in counts.items() if count]:
            rows.append(("health", f"{', '.join(told)}; see the report"))
        if saved := complete(self._folder.checkpoints):
            rows.append(("checkpoint", str(saved[0])))
        rows.append(("report", str(self._folder.report)))
        if self._mlflow:
            late = "" if shipped else f" (not all there yet: {_program('duet')} track sync {path})"
            rows.append(("mlflow", self._mlflow + late))
            if self._mlflow.startswith("sqlite"):
                rows.append(("open it", f"{_program('mlflow')} ui --backend-store-uri {self._mlflow}"))
        submitted = JobFolder(path).submissions()
        again = f"resume {path}" if submitted else f"train {path}/config.yaml --ranks {facts['world_size']}"
        rows.append(("resume", f"{_program('duet')} {again}"))
        return rows


def _program(name: str) -> str:
    """How to call a program of this environment from the shell the user is in."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
