"""The run folder: its paths, what identifies it, and what may change when it is resumed.

config.yaml  run.json  metrics.jsonl  attempts/  checkpoints/  logs/  report.html
"""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.atomic import write_atomic, write_json
from data_pipeline.errors import CheckpointError, RunError
from pretrain.config import Config, differences, dump
from pretrain.journal import read
from pretrain.runs import saved_steps
from pretrain.schedule import decay_start

FORMAT = 1
MAY_CHANGE = (
    "batch.micro_batch",
    "data.",
    "engine.",
    "health.",
    "profile.",
    "run.dir",
    "tracking.",
    "train.checkpoint_every",
    "train.eval_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.log_every",
    "train.sample_tokens",
)
"""Keys that do not alter what is learned: where the data lies (its fingerprint is checked), how it is computed.

`train.steps` may change, too, while the learning rate has not depended on it (`RunFolder._steps_may_change`).
"""


class RunFolder:
    """Paths of a run folder and the two files that identify it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.run_file = path / "run.json"
        self.journal = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.report = path / "report.html"
        self.id: str | None = None
        """Of the run, once it is claimed: made once, and kept by a folder that is moved or copied."""

    def claim(self, config: Config, dataset: dict[str, Any]) -> None:
        """Write the run's identity, or check that the folder belongs to this very run.

        `dataset` holds at least `fingerprint`. Call it as the owner of the lease. A folder whose run never took a
        step belongs to nobody yet.

        Raises:
            RunError: the folder belongs to another configuration or another dataset; names the keys.
        """
        known = self._known_id()
        if self.run_file.exists() and self.has_trained():
            self.check(config, dataset)
            write_atomic(self.config_file, dump(config))
        else:  # the run file last: what it stands for is whole
            write_atomic(self.config_file, dump(config))
            write_json(self.run_file, {"format": FORMAT, "name": config.run.name, "dataset": dataset})
        self.id = known or uuid.uuid4().hex
        self.describe(id=self.id)

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return saved_steps(self.path)

    def check_never_saved(self) -> None:
        """Whether a run without a checkpoint may start from scratch.

        Raises:
            CheckpointError: the journal tells of checkpoints that are gone. A run never starts over silently.
        """
        if self.journal.exists():
            saved = [record.step for record in read(self.journal) if record.kind == "checkpoint"]
            if saved:
                raise CheckpointError(
                    f"{self.checkpoints}: the journal tells of a checkpoint of step {saved[-1]}, but none is "
                    "there any more; restore it from a copy, or start a new run with another run.name"
                )

    def describe(self, **facts: Any) -> None:
        """Add facts about the run (parameters, versions, …) to run.json."""
        write_json(self.run_file, self.facts() | facts)

    def facts(self) -> dict[str, Any]:
        """Content of run.json.

        Raises:
            RunError: there is none, or it was written by a newer version.
        """
        if not self.run_file.is_file():
            raise RunError(f"{self.path}: not a run folder (no run.json); `duet train` makes one")
        facts = _parsed(self.run_file, json.loads)
        if facts.get("format") != FORMAT:
            raise RunError(
                f"{self.run_file}: format {facts.get('format')} is not known here; this version reads {FORMAT}"
            )
        return facts

    def config(self) -> Config:
        """The configuration the run was last started with.

        Raises:
            RunError: the folder is not a run folder.
        """
        self.facts()
        config: Config = _parsed(self.config_file, lambda text: Config.model_validate(yaml.safe_load(text)))
        return config

    def has_trained(self) -> bool:
        """Whether the run ever took a step."""
        return self.journal.exists() and any(record.kind == "metrics" for record in read(self.journal))

    def check(self, config: Config, dataset: dict[str, Any]) -> None:
        """Whether a run of this configuration and dataset may go on in this folder.

        Raises:
            RunError: it may not; names what differs.
        """
        recorded = self.facts()["dataset"]
        # From its second phase on, what the data may be is decided by where the run stands in them.
        if recorded["fingerprint"] != dataset["fingerprint"] and config.data.phase == 1:
            raise RunError(
                f"{self.path}: this run was trained on dataset {recorded['fingerprint'][:12]} ({recorded['path']}), "
                f"data.path={config.data.path} is dataset {dataset['fingerprint'][:12]}; "
                "give the old data.path, start a new run with another run.name, or go on with these data as a new "
                "phase (data.phase=2)"
            )
        ours = self.config()
        changed = {
            key: values
            for key, values in differences(ours, config).items()
            if (not key.startswith(MAY_CHANGE) or key == "data.objective")
            and not (key == "train.steps" and self._steps_may_change(ours, config))
        }
        if changed:
            raise RunError(
                f"{self.path}: this run folder belongs to another configuration:\n{told(changed)}\n"
                "give the old values, or start a new run with another run.name"
            )

    def _known_id(self) -> str | None:
        with suppress(RunError):  # none yet, or damaged: then `claim` makes it anew, or refuses the folder
            return self.facts().get("id")
        return None

    def _steps_may_change(self, ours: Config, config: Config) -> bool:
        """Whether the steps up to the newest checkpoint had the learning rate that the new `train.steps` gives them.

        Raises:
            RunError: it is a `wsd` run whose cool-down has begun.
        """
        if config.schedule != ours.schedule or config.schedule.kind in ("cosine", "linear"):
            return False
        start = min((s for s in (decay_start(ours), decay_start(config)) if s is not None), default=None)
        saved = self.saved_steps()
        if start is None or not saved or saved[-1] <= start:
            return True
        raise RunError(
            f"{self.path}: train.steps: {ours.train.steps} in the run, {config.train.steps} now, but the cool-down of "
            f"schedule.cooldown={config.schedule.cooldown} steps begins after step {start}, and the newest checkpoint "
            f"is of step {saved[-1]}; give the old value, or start a new run from a checkpoint up to step {start}: "
            f"duet train --from {self.path}@STEP run.name=NEW train.steps={config.train.steps}"
        )


def told(changed: dict[str, tuple[Any, Any]]) -> str:
    """A line for each key of which a run has another value than now."""
    return "\n".join(f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items())


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{file}: damaged or missing: {error}; restore it from a copy") from error
