"""A trained model and what belongs to it, from a checkpoint."""

import sys
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from torch import Tensor

from data_pipeline.errors import CheckpointError, ConfigError, DataError, RunError
from data_pipeline.files.filesystem import is_uri
from data_pipeline.places import EXPORT, kind_of, mistaken
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.chat_template import ChatTemplate
from data_pipeline.tokenize.tokenizer import TOKENIZER, Tokenizer, model_file
from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.config.model_config import ModelConfig
from model.generation.decoding import check_continues
from pretrain.checkpoint.checkpoint import Checkpoint, whole
from pretrain.checkpoint.ownership import check_own
from pretrain.config.architecture import opened
from pretrain.config.schema import Config
from pretrain.engine.buffers import persistent_buffers
from pretrain.finetune.base import weights_of
from pretrain.objectives.registry import objective_of
from pretrain.run.checkpoint_folder import complete, is_checkpoint, step_of, step_path, while_there
from pretrain.run.run_folder import RunFolder


class Trained(NamedTuple):
    """What is needed to use a model."""

    model: TokenModel
    """In fp32 and evaluation mode, on the CPU; its shape is `model.config`."""
    tokenizer: Tokenizer
    objective: str
    """What it learned from, as `data.objective` names it."""
    run: str
    """Name of the run that trained it."""
    step: int
    chat_template: str | None = None
    """Of what it learned from conversations with."""

    @property
    def writes_targets(self) -> bool:
        """What it writes is the target of a source, not the text behind a prompt."""
        return self.model.config.traits.writes_targets and not objective_of(self.objective).continues_text

    def chat(self) -> ChatTemplate:
        """How messages are written. Raises ConfigError for a model that learned from no conversations."""
        if self.chat_template is None:
            raise ConfigError(
                f"the model was trained with data.objective={self.objective}, not with conversations, so there is no "
                "template for messages; give a text to continue with --prompt"
            )
        return ChatTemplate(self.chat_template, self.tokenizer)

    def check_continues(self) -> None:
        """Raises ConfigError for a model that was not trained to continue a text."""
        check_objective(self.model.config, self.objective)


def check_objective(config: ModelConfig, objective: str) -> None:
    """Raises ConfigError unless a model of this shape and objective continues texts."""
    check_continues(config)
    if not (config.traits.writes_targets or config.reads_prompt or objective_of(objective).continues_text):
        raise ConfigError(
            f"the model was trained with data.objective={objective}, where a prompt is read both ways; it is not "
            "generated from"
        )


def check_next_token(config: ModelConfig, objective: str) -> None:
    """Raises ConfigError unless such a model predicts the next token of one text."""
    check_objective(config, objective)
    if config.traits.two_sequences:
        raise ConfigError(
            f"{config.architecture} reads one sequence and writes another, so it does not give the next token of one "
            "text; duet generate writes with it"
        )


def find_checkpoint(path: Path, step: int | None = None) -> tuple[Checkpoint, Config]:
    """A checkpoint by its folder or by that of its run, compared with its hashes, and the configuration.

    Args:
        path: of a checkpoint, or of a run: then its newest one, or that of `step`.

    Raises:
        RunError: neither the one nor the other.
        CheckpointError: no such checkpoint, or it is damaged.
        ConfigError: `step` of what is not a run folder.
    """
    if is_checkpoint(path):
        if step is not None:
            raise ConfigError(f"{path} is one checkpoint, which has one step; leave step {step} out")
        checkpoint = whole(path)
        return checkpoint, saved_config(checkpoint)
    checkpoint = while_there(lambda: _checkpoint_of(path, step), whole)
    check_own(checkpoint, RunFolder(path))
    return checkpoint, opened(RunFolder(path).config(), path)


def saved_config(checkpoint: Checkpoint) -> Config:
    """The configuration in a checkpoint's manifest. Raises CheckpointError if it is not there."""
    try:
        config = Config.model_validate(checkpoint.manifest.state["config"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{checkpoint.path}: the manifest does not hold the configuration: {error!r}") from None
    return opened(config, checkpoint.path.absolute().parents[1])


def read_model(checkpoint: Checkpoint, config: Config) -> TokenModel:
    """The model of a checkpoint, in fp32 and evaluation mode. Raises CheckpointError if it is another model's."""
    model = registry.build(config.model)
    weights = whole_weights(checkpoint, config, {name: list(p.shape) for name, p in model.named_parameters()})
    checkpoint.check_buffers(persistent_buffers(model))
    model.load_state_dict(weights | checkpoint.buffers())
    return model.eval()


def whole_weights(checkpoint: Checkpoint, config: Config, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The fp32 parameters of a checkpoint's model. Raises CheckpointError unless they have these shapes."""
    if config.finetune.kind != "lora":
        checkpoint.check_shapes(shapes)
    weights = weights_of(checkpoint, config)
    if odd := sorted(name for name in shapes if name not in weights or list(weights[name].shape) != shapes[name]):
        raise CheckpointError(f"{config.run.start_from}: of another model; first difference: {odd[0]}")
    return weights


def tokenizer_of(checkpoint: Checkpoint, config: Config) -> tuple[Path, Tokenizer]:
    """The tokenizer that a checkpoint's model was trained with, and its file, from the run's dataset.

    Raises:
        DataError: the dataset has no tokenizer, or another one.
    """
    if is_uri(config.data.path):
        file = Dataset.of(config.data, check=False).tokenizer_file()
    else:
        file = model_file(Path(config.data.path) / TOKENIZER)
    if not file.is_file():
        raise DataError(
            f"{file} is missing, and {checkpoint.path} was trained with data.path={config.data.path}: go to the folder "
            "that it starts from, or restore the dataset"
        )
    tokenizer = Tokenizer.load(file)
    wanted = checkpoint.manifest.state.get("tokenizer", tokenizer.sha256)
    if tokenizer.sha256 != wanted:
        raise DataError(
            f"wrong tokenizer: {file} has sha256 {tokenizer.sha256[:12]}, {checkpoint.path} was trained with "
            f"{wanted[:12]}; restore that dataset"
        )
    return file, tokenizer


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """That of the conversations a run learned from; None if it did not."""
    found: str | None = checkpoint.manifest.state.get("chat_template")
    return found


def _checkpoint_of(run: Path, step: int | None) -> Path:
    folder = RunFolder(run)
    if not folder.run_file.is_file():
        told = mistaken(run, f"run folder{' or checkpoint' if kind_of(run) == EXPORT else ', checkpoint or export'}")
        why = "no run.json" if run.exists() else "there is no such folder"
        raise RunError(f"{run}: {told or f'not a run folder ({why}), and not a checkpoint or an export either'}")
    found = complete(folder.checkpoints, lambda text: print(f"warning: {text}", file=sys.stderr))
    if not found:
        raise CheckpointError(f"{run}: no complete checkpoint yet")
    path = found[0] if step is None else step_path(folder.checkpoints, step)
    if path not in found and not is_checkpoint(path):  # what is wrong with one that is there, it says when it is opened
        steps = ", ".join(str(step_of(p)) for p in found)
        raise CheckpointError(f"{run}: no complete checkpoint of step {step}; there are: {steps}")
    return path
