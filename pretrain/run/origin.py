"""A new run that begins with a checkpoint of another one: `run.start_from`, `RUN@STEP`. Free of torch."""

import json
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.files.sealed import unseal
from data_pipeline.places import EXPORT, RUN, kind_of
from model.architectures.external import is_external
from model.config.model_config import ModelConfig
from pretrain.config.changes import refused_in_fork, told
from pretrain.config.schedule import decay_start
from pretrain.config.schema import Config, model_from
from pretrain.run.checkpoint_folder import MANIFEST, step_path
from pretrain.run.run_folder import RunFolder

WEIGHTS, TRAIN = "model.safetensors", "train.yaml"
"""Of an export: its weights, and the configuration that a run which begins with them has."""


def parse(start_from: str) -> tuple[Path, int | None]:
    """The run folder and the step of `RUN@STEP`; None for the newest checkpoint, and for a folder of such a name."""
    run, mark, step = start_from.rpartition("@")
    if not mark or not step.isdecimal() or (kind_of(Path(start_from)) and kind_of(Path(run)) != RUN):
        return Path(start_from), None
    return Path(run), int(step)


def first_file(start_from: str) -> Path:
    """The configuration that a run which begins so has, but for what is given. Raises RunError if there is none."""
    path = parse(start_from)[0]
    if kind_of(path) == EXPORT:
        if not (path / TRAIN).is_file():
            raise RunError(f"{path}: an export of an older version, without {TRAIN}; export the checkpoint again")
        return path / TRAIN
    origin = RunFolder(path)
    origin.facts()  # a run folder
    return origin.config_file


def resolve(config: Config) -> Config:
    """The configuration with the origin's absolute path and its step, as the run folder keeps it.

    A run that has begun keeps the step that it began with, even if its origin has newer checkpoints.

    Raises:
        RunError: the origin is not a run folder, or is this very run; it has no such checkpoint.
    """
    if config.run.start_from is None:
        return config
    path, step = parse(config.run.start_from)
    path = path.resolve()
    folder = RunFolder(config.run_dir)
    if kind_of(path) == EXPORT:
        if config.finetune.kind == "none" or step is not None:
            raise ConfigError(
                f"run.start_from={config.run.start_from}: an export has weights of one step, and no state to go on "
                "with: name it without a step, and set finetune.kind=full or finetune.kind=lora"
            )
        return _begun(config, path, None)
    if path == folder.path.resolve():
        raise RunError(f"run.start_from={config.run.start_from}: the run itself; give the new one a name: run.name=NEW")
    if step is None and folder.has_trained():
        begun = folder.config().run.start_from
        step = parse(begun)[1] if begun and parse(begun)[0] == path else None
    if step is None:
        step = _newest(path)
    return _begun(config, path, step)


def _begun(config: Config, path: Path, step: int | None) -> Config:
    """The configuration with its origin, and the hash of the weights in it if these are all that is taken."""
    run = config.run.model_copy(update={"start_from": f"{path}" if step is None else f"{path}@{step}"})
    kind, folder, base = config.finetune.kind, RunFolder(config.run_dir), None
    noted = folder.config().finetune.base if kind != "none" and folder.has_trained() else None
    if kind == "full" and noted:  # its checkpoints hold all of it
        base = noted
    elif kind != "none":
        base = base_hash(path, step, noted)
    tuned = config.finetune.model_copy(update={"base": base})
    return config.model_copy(update={"run": run, "finetune": tuned})


def base_hash(path: Path, step: int | None, noted: str | None = None) -> str:
    """Of the weights of an export, or of the manifest of a run's checkpoint, which holds those of its shards: without
    the validation loss, which may be added later.

    Args:
        noted: what a run has noted of them. Older versions took the whole manifest; it is returned where that is so.

    Raises:
        RunError: there are none.
    """
    file = path / WEIGHTS if step is None else step_path(RunFolder(path).checkpoints, step) / MANIFEST
    digest = xxhash.xxh3_128()
    try:
        with open(file, "rb") as opened:
            while block := opened.read(2**23):
                digest.update(block)
        if step is None or digest.hexdigest() == noted:
            return digest.hexdigest()
        content = unseal(file.read_bytes(), formats=())
    except OSError as error:
        saved = RunFolder(path).saved_steps() if step is not None else []
        way = f"there are checkpoints of steps {', '.join(map(str, saved))}" if saved else "bring it back"
        raise RunError(f"{file}: cannot be read: {error.strerror}; {way}") from None
    except ValueError as error:
        raise RunError(f"{file}: damaged: {error}") from None
    content.pop("validation_loss", None)
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def folder(config: Config) -> RunFolder:
    """That of the run that a run of this (resolved) configuration begins with."""
    assert config.run.start_from is not None
    return RunFolder(parse(config.run.start_from)[0])


def checkpoint_folder(config: Config) -> Path:
    """Where the checkpoint lies that a run of this (resolved) configuration begins with. Raises RunError: it is gone,
    or never was."""
    assert config.run.start_from is not None
    step = parse(config.run.start_from)[1]
    assert step is not None
    origin = folder(config)
    if step not in (saved := origin.saved_steps()):
        steps = ", ".join(map(str, saved)) or "none"
        raise RunError(f"{origin.path}: no complete checkpoint of step {step}; there are: {steps}")
    return step_path(origin.checkpoints, step)


def check(config: Config, dataset: dict[str, Any]) -> None:
    """Whether a run of this (resolved) configuration and dataset may begin; one with checkpoints of its own has begun.

    Raises:
        RunError: it may not: names what differs, or the checkpoints that there are.
        ConfigError: the run would be over, or its cool-down would begin before the checkpoint.
    """
    if config.run.start_from is None or RunFolder(config.run_dir).saved_steps():
        return
    path, step = parse(config.run.start_from)
    if config.finetune.kind != "none":
        check_model(path, config)
        return
    origin = RunFolder(path)
    theirs = origin.facts()["dataset"]
    assert step is not None
    checkpoint_folder(config)
    if theirs["fingerprint"] != dataset["fingerprint"]:
        raise RunError(
            f"{path}: that run was trained on dataset {theirs['fingerprint'][:12]} ({theirs['path']}), "
            f"data.path={config.data.path} is dataset {dataset['fingerprint'][:12]}; a run that begins with its "
            "checkpoint goes on with its data"
        )
    if different := refused_in_fork(origin.config(), config):
        raise RunError(
            f"{path}: a run that begins with its checkpoint must agree with it in model, batch, seed and optimizer:\n"
            f"{told(different)}\ngive the run's values, or start from scratch, without run.start_from"
        )
    if step >= config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} counts from the origin's start, and its checkpoint is of step {step} "
            f"already; give more, for example train.steps={step + max(config.schedule.cooldown, 1)}"
        )
    start = decay_start(config)
    if config.schedule.kind == "wsd" and start is not None and start < step:
        raise ConfigError(
            f"schedule.cooldown={config.schedule.cooldown} of train.steps={config.train.steps} would begin at step "
            f"{start}, before the checkpoint of step {step}; give train.steps={step + config.schedule.cooldown}, or a "
            f"cool-down of at most {config.train.steps - step}"
        )


def model_of(path: Path) -> ModelConfig:
    """That of an export, or of a run folder, whose weights a run begins with. Raises RunError."""
    if kind_of(path) != EXPORT:
        return RunFolder(path).config().model
    try:
        return model_from(json.loads((path / "config.json").read_text())["duet"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / 'config.json'}: missing, damaged, or not of an export of Duet: {error!r}") from None


def check_model(path: Path, config: Config) -> None:
    """Whether a run may begin with these weights: its model is theirs, but for what it says of labels, which may be
    new. Raises RunError."""
    theirs = config.model_copy(update={"model": model_of(path)})
    if is_external(theirs.model.architecture) and is_external(config.model.architecture):
        return  # whether the weights fit is seen when they are read
    refused = refused_in_fork(theirs, config)
    different = {key: refused[key] for key in refused if key.startswith("model.") and not key.startswith("model.head.")}
    if different:
        raise RunError(f"{path}: weights of another model:\n{told(different)}\ngive the values of their training")


def _newest(path: Path) -> int:
    origin = RunFolder(path)
    origin.facts()  # it is a run folder
    saved = origin.saved_steps()
    if not saved:
        raise RunError(f"{path}: no complete checkpoint yet; run.start_from needs one")
    return saved[-1]
