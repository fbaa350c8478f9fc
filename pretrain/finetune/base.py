"""The weights that a run begins with, and those that its checkpoints come to together with them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import CheckpointError, DataError, RunError
from data_pipeline.places import EXPORT, kind_of
from data_pipeline.tokenize.tokenizer import JSON, MODEL
from model.architectures.encoder_only.labels import HEAD
from model.architectures.names import current_name
from model.architectures.token_model import TokenModel
from model.layers.int8 import restored
from pretrain.checkpoint.checkpoint import Checkpoint, whole
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.config.schema import Config
from pretrain.finetune.lora import adapt, merged
from pretrain.run.checkpoint_folder import hold, step_path
from pretrain.run.origin import WEIGHTS, base_hash, model_of, parse
from pretrain.run.run_folder import RunFolder


def prepare(model: TokenModel, config: Config, *, begun: bool) -> None:
    """Give a fresh model the weights that its run begins with, and adapters if these are what is trained. A head of
    labels stays fresh, unless the weights have one of the same labels.

    Args:
        begun: the run has checkpoints of its own, which hold all that is trained.

    Raises:
        CheckpointError: the weights are gone, are others than the run has begun with, or are another model's.
        ConfigError: there is no linear map of a name that is to be adapted.
    """
    if config.finetune.kind == "none" or (config.finetune.kind == "full" and begun):
        return
    fresh = {name: values for name, values in model.state_dict().items() if name.startswith(HEAD)}
    try:
        model.load_state_dict(fresh | _base(config))
    except RuntimeError as error:
        raise CheckpointError(f"{config.run.start_from}: of another model: {error}") from None
    if config.finetune.kind == "lora":
        adapt(model, config.finetune, config.run.seed)


def check_tokenizer(config: Config, sha256: str) -> None:
    """Whether data are made of the tokens that the weights know, by the hash of the tokenizer's file.

    Raises:
        DataError: they are not.
    """
    if config.finetune.kind == "none":
        return
    assert config.run.start_from is not None
    path, step = parse(config.run.start_from)
    if kind_of(path) == EXPORT:
        files = [path / name for name in (MODEL, JSON) if (path / name).is_file()]
        known = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        way = f"data.tokenizer.model={files[0]}" if files else "the export has none"
    else:
        manifest = CheckpointManifest.load(step_path(RunFolder(path).checkpoints, step or 0))
        known = {manifest.state.get("tokenizer", sha256)}
        way = "data.tokenizer.model=FILE, with the one in its dataset"
    if sha256 not in known:
        raise DataError(
            f"{config.data.path} was tokenized otherwise than the weights of {config.run.start_from} were trained: "
            f"build it with their tokenizer: {way}"
        )


def weights_of(checkpoint: Checkpoint, config: Config) -> dict[str, Tensor]:
    """The fp32 parameters of a checkpoint's model, whole, by name: adapters are added to what they adapt.

    Raises:
        CheckpointError: as `prepare`.
    """
    found = checkpoint.weights()
    if config.finetune.kind != "lora":
        return found
    base = {name: values for name, values in _base(config).items() if name not in checkpoint.manifest.buffers}
    return merged(base, found, config.finetune.scale)


def verify_base(checkpoint: Checkpoint) -> None:
    """Of a checkpoint that holds adapters, whether the weights that they change are there, whole and unchanged.

    Raises:
        CheckpointError: they are not.
    """
    if checkpoint.manifest.state.get("config", {}).get("finetune", {}).get("kind") != "lora":
        return
    path, step = _unchanged(_config_of(checkpoint))
    if step is not None:
        verify_base(whole(step_path(RunFolder(path).checkpoints, step)))


def hold_base(config: Config, warn: Callable[[str], None]) -> None:
    """Have the checkpoint that a run begins with stay where it is, if it is another run's, which removes its older
    ones: as long as adapters change it, else until the run has a checkpoint of its own.

    Args:
        config: of the run that begins so, whose folder is there.
        warn: hears where nothing can be noted in the checkpoint.
    """
    path, step = parse(config.run.start_from or "")
    to_begin = config.finetune.kind != "lora"
    if step is None or (to_begin and RunFolder(config.run_dir).saved_steps()):
        return
    try:
        hold(step_path(RunFolder(path).checkpoints, step), config.run_dir.resolve(), to_begin=to_begin)
    except (OSError, DataError) as error:
        how_long = "until it has one of its own" if to_begin else "as long as it is used"
        other_way = "" if config.finetune.kind == "none" else ", or begin with an export of it"
        warn(
            f"{config.run.start_from}: this run needs the checkpoint {how_long}, and could not note that in it: "
            f"{error}; see that train.keep_checkpoints does not remove it{other_way}"
        )


def _base(config: Config) -> dict[str, Tensor]:
    """Parameters and buffers that a run of this (resolved) configuration begins with, in fp32; a head of other labels
    is left out."""
    path, step = _unchanged(config)
    found = _of_export(path) if kind_of(path) == EXPORT else _of_run(path, step)
    if model_of(path).label_head == config.model.label_head:
        return found
    return {name: values for name, values in found.items() if not name.startswith(HEAD)}


def _unchanged(config: Config) -> tuple[Path, int | None]:
    """Where the weights lie that a run has begun with, by their hash. Raises CheckpointError if they do not."""
    assert config.run.start_from is not None
    path, step = parse(config.run.start_from)
    try:
        found = base_hash(path, step, config.finetune.base)
    except RunError as error:
        raise CheckpointError(f"{error}; what is trained are changes to these weights") from None
    if found != config.finetune.base:
        raise CheckpointError(
            f"{config.run.start_from}: changed since the run has begun with it: its hash is {found}, it was "
            f"{config.finetune.base}; restore it"
        )
    return path, step


def _of_export(path: Path) -> dict[str, Tensor]:
    try:
        tensors = restored(load_file(path / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: missing or damaged: {error}") from None
    return {
        current_name(name): values.float() if values.is_floating_point() else values for name, values in tensors.items()
    }


def _of_run(path: Path, step: int | None) -> dict[str, Tensor]:
    assert step is not None
    checkpoint = whole(step_path(RunFolder(path).checkpoints, step))
    return weights_of(checkpoint, _config_of(checkpoint)) | checkpoint.buffers()


def _config_of(checkpoint: Checkpoint) -> Config:
    try:
        return Config.model_validate(checkpoint.manifest.state["config"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{checkpoint.path}: the manifest does not hold the configuration: {error!r}") from None
