"""The run folder: its paths, what identifies it, and whether a configuration may go on in it.

config.yaml  run.json  metrics.jsonl  architecture/  attempts/  checkpoints/  logs/  report.html
"""

import json
import shlex
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.files.atomic import write_atomic
from data_pipeline.files.sealed import unseal, write_sealed
from data_pipeline.places import RUN, mistaken
from model.architectures.external import is_external
from pretrain.config import architecture
from pretrain.config.changes import refused, refused_in_fork, told
from pretrain.config.schedule import decay_start
from pretrain.config.schema import ARCHITECTURE, Config, differences, dump
from pretrain.run.journal import read
from pretrain.run.run_listing import saved_steps

FORMAT = 2
"""Format 1 had neither a hash nor the configuration, which then is that of config.yaml."""


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

        `dataset` holds at least `fingerprint` and `path`. Call it as the owner of the lease. A folder whose run never
        took a step belongs to nobody yet.

        Raises:
            RunError: the folder belongs to another configuration or another dataset; names the keys.
        """
        self.id = self._known_id() or uuid.uuid4().hex
        if self.has_trained():
            self.check(config, dataset)
        else:
            self._write(config, {"name": config.run.name, "dataset": dataset, "id": self.id})

    def kept(self, config: Config) -> Config:
        """A configuration to go on with: what it leaves open, and the run does not, stays as it is."""
        if config.train.eval_tokens is not None or not self.has_trained():
            return config
        train = config.train.model_copy(update={"eval_tokens": self.config().train.eval_tokens})
        return config.model_copy(update={"train": train})

    def went_on(self, config: Config, dataset: dict[str, Any]) -> None:
        """The run goes on with this configuration and dataset, which `check` has let pass."""
        self._write(config, self.facts() | {"name": config.run.name, "dataset": dataset, "id": self.id})

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
        self._write(self.config(), self.facts() | facts)

    def facts(self) -> dict[str, Any]:
        """Content of run.json, without the configuration.

        Raises:
            RunError: there is none, it is damaged, or it was written by a newer version.
        """
        return {name: value for name, value in self._content().items() if name != "config"}

    def config(self) -> Config:
        """The configuration that the run last went on with; config.yaml is a copy of it to edit and to start with.

        No source of an architecture is run for it; `pretrain.config.architecture.opened` does.

        Raises:
            RunError: the folder is not a run folder, or the file is damaged.
        """
        content = self._content()
        file = self.run_file if "config" in content else self.config_file
        try:
            found = content["config"] if "config" in content else yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(train := found.get("train"), dict):
                train.setdefault("eval_tokens", "all")  # so it was before there was the key
            config: Config = Config.model_validate(found)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise RunError(f"{file}: damaged or missing: {_brief(error)}; restore it from a copy") from error
        return config

    def has_trained(self) -> bool:
        """Whether the run ever took a step."""
        if self.run_file.exists() and self.saved_steps():
            return True
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
        changed = refused(ours, config)
        if "train.steps" in changed and self._steps_may_change(ours, config):
            del changed["train.steps"]
        if changed:
            raise RunError(
                f"{self.path}: this run folder belongs to another configuration:\n{told(changed)}\n"
                f"{self._old(changed)}, or start a new run: {self._new_run(ours, config, list(changed))}"
            )

    def _old(self, changed: dict[str, Any]) -> str:
        """How the run goes on as it was."""
        if ARCHITECTURE not in changed or not all(map(is_external, changed[ARCHITECTURE])):
            return "give the old values"
        return f"go on with the run's own copy of the source: duet train {shlex.quote(str(self.config_file))}"

    def _new_run(self, ours: Config, config: Config, changed: list[str]) -> str:
        """A command, or what there is to say in its place."""
        saved = self.saved_steps()
        if kept := list(refused_in_fork(ours, config)):
            return f"from scratch, with another run.name (--from begins with a checkpoint, and keeps {', '.join(kept)})"
        if not saved:
            return "from scratch, with another run.name"
        values = differences(ours, config)
        given = [f"{key}={_plain(values[key][1])}" for key in changed if not key.startswith("run.")]
        return shlex.join(["duet", "train", "--from", f"{self.path}@{saved[-1]}", "run.name=NEW", *given])

    def _content(self) -> dict[str, Any]:
        if not self.run_file.is_file():
            lost = self.journal.exists() or bool(self.saved_steps())
            if not lost and (told := mistaken(self.path, RUN)):
                raise RunError(f"{self.path}: {told}")
            if lost:
                raise RunError(f"{self.path}: run.json is missing; restore it from a copy, or take another run.name")
            why = "no run.json" if self.path.exists() else "there is no such folder"
            raise RunError(f"{self.path}: not a run folder ({why}); `duet train` makes one")
        try:
            content = unseal(self.run_file.read_bytes(), formats=(FORMAT,))
            version = content.get("format")
            if version not in (1, FORMAT):
                raise RunError(f"{self.run_file}: format {version} is not known here; this version reads {FORMAT}")
            _check_types(content)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.run_file}: damaged: {error}; restore it from a copy (MLflow has one of a tracked run), or "
                "start a new run with another run.name"
            ) from error
        return content

    def _write(self, config: Config, facts: dict[str, Any]) -> None:
        content = facts | {"format": FORMAT, "config": config.model_dump(mode="json")}
        architecture.keep(config.model, self.path)
        write_atomic(self.config_file, dump(config))
        write_sealed(self.run_file, content)  # last: what it stands for is whole

    def _known_id(self) -> str | None:
        with suppress(RunError):  # none yet, or damaged: then `claim` makes it anew, or refuses the folder
            return self.facts().get("id")
        return None

    def _steps_may_change(self, ours: Config, config: Config) -> bool:
        """Whether the steps up to the newest checkpoint had the learning rate that the new `train.steps` gives them.

        Raises:
            RunError: it is a `wsd` run whose cool-down has begun, or the run has gone further already.
        """
        if config.schedule != ours.schedule or config.schedule.kind in ("cosine", "linear"):
            return False
        start = min((s for s in (decay_start(ours), decay_start(config)) if s is not None), default=None)
        saved = self.saved_steps()
        if saved and saved[-1] > config.train.steps:
            raise RunError(
                f"{self.path}: train.steps={config.train.steps}, but the run has gone further: its newest checkpoint "
                f"is of step {saved[-1]}; give at least as many steps"
            )
        if start is None or not saved or saved[-1] <= start:
            return True
        raise RunError(
            f"{self.path}: train.steps: {ours.train.steps} in the run, {config.train.steps} now, but the cool-down of "
            f"schedule.cooldown={config.schedule.cooldown} steps begins after step {start}, and the newest checkpoint "
            f"is of step {saved[-1]}; give the old value, or start a new run from a checkpoint up to step {start}: "
            f"duet train --from {shlex.quote(str(self.path))}@STEP run.name=NEW train.steps={config.train.steps}"
        )


def _check_types(content: dict[str, Any]) -> None:
    """Raises ValueError: of format 1 there is no hash that would tell."""
    dataset = content.get("dataset")
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key), str) for key in ("fingerprint", "path")):
        raise ValueError("expected `dataset` with a fingerprint and a path")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
    return str(error) or type(error).__name__
