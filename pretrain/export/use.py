"""A trained model after the run: where it is read from, and its validation."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.storage.dataset import Dataset
from model.architectures.token_model import TokenModel
from model.config.mask_config import EVAL_ROUNDINGS
from model.config.transformer import TransformerConfig
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.engine.caches import own_caches
from pretrain.engine.distributed import join
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import evaluate, held_out, held_out_bytes
from pretrain.export.portable import is_export, load_export
from pretrain.inference.in_use import used_with
from pretrain.inference.trained import Trained, chat_template_of, find_checkpoint, read_model, tokenizer_of

Progress = Callable[[int, int], object]


def open_trained(path: Path, step: int | None = None, changes: Sequence[str] = ()) -> Trained:
    """The model of a run folder (its newest checkpoint, or that of `step`), of a checkpoint or of an export.

    `changes`: of keys that may change in use, as `used_with` takes them, which says what else is raised.

    Raises:
        RunError: none of them.
        CheckpointError: no such checkpoint, or it is damaged.
        ConfigError: `step` of what is not a run folder.
        DataError: the tokenizer is missing, or another one.
    """
    own_caches()
    if is_export(path):
        if step is not None:
            raise ConfigError(f"{path} is an export, which has one step; leave step {step} out")
        return _changed(load_export(path), changes)
    checkpoint, config = find_checkpoint(path, step)
    tokenizer = tokenizer_of(checkpoint, config)[1]
    step = checkpoint.manifest.step
    model = read_model(checkpoint, config)
    trained = Trained(model, tokenizer, config.data.objective, config.run.name, step, chat_template_of(checkpoint))
    return _changed(trained, changes)


def evaluate_run(
    run: Path,
    step: int | None,
    rounding: str | None = None,
    progress: Progress = lambda done, total: None,
    changes: Sequence[str] = (),
) -> dict[str, float]:
    """Validation metrics of a checkpoint over all held-out text, as `evaluate` gives them.

    Says on standard error when that text is of another dataset than the checkpoint's.

    Args:
        rounding: of learned dropout's masks, one of EVAL_ROUNDINGS; the run's own unless given.
        progress: told before each batch how many are done, and of how many.
        changes: of keys that may change in use, as `used_with` takes them.

    Raises:
        DataError: the dataset is damaged, or its tokenizer another one than the model was trained with.
    """
    if is_export(run):
        raise ConfigError(f"{run} is an export, and does not say where its held-out text lies; name the run folder")
    checkpoint, config = find_checkpoint(run, step)
    if rounding:
        config = _rounded(run, config, rounding)
    with validating(checkpoint, config, progress) as validate:
        return validate(used_with(read_model(checkpoint, config), changes))


@contextmanager
def validating(
    checkpoint: Checkpoint, config: Config, progress: Progress = lambda done, total: None
) -> Iterator[Callable[[TokenModel], dict[str, float]]]:
    """What validates models over the held-out text of a checkpoint's run, as `evaluate_run` does, and raises as it."""
    own_caches()
    dataset = opened_dataset(checkpoint, config)
    windows = held_out(dataset, config)
    with join(config.engine.timeout_minutes) as ranks:
        batch = max(1, 8192 // config.model.context)
        batches = Batches.of(config, dataset, ranks.device)
        sizes = held_out_bytes(dataset)
        yield lambda model: evaluate(model.to(ranks.device), windows, sizes, batch, ranks, batches, progress)


def opened_dataset(checkpoint: Checkpoint, config: Config) -> Dataset:
    """That of a checkpoint's run, whose held-out text is read; where it is another one now, standard error says so.

    Raises:
        DataError: it is damaged, or its tokenizer another one than the model was trained with.
    """
    tokenizer_of(checkpoint, config)  # as many pieces may be others
    dataset = Dataset.of(config.data)
    trained_on = checkpoint.manifest.state.get("data", {}).get("fingerprint", dataset.manifest.fingerprint)
    if trained_on != dataset.manifest.fingerprint:
        print(
            f"warning: {config.data.path} is dataset {dataset.manifest.fingerprint[:12]}, and {checkpoint.path} was "
            f"trained on {trained_on[:12]}: its held-out text may be another, and may have been trained on",
            file=sys.stderr,
        )
    return dataset


def _changed(trained: Trained, changes: Sequence[str]) -> Trained:
    return trained._replace(model=used_with(trained.model, changes))


def _rounded(run: Path, config: Config, rounding: str) -> Config:
    model = config.model
    if not isinstance(model, TransformerConfig) or not model.learned_dropout.enabled:
        raise ConfigError(f"{run} was trained without learned dropout: it has no masks to round")
    if rounding not in EVAL_ROUNDINGS:
        raise ConfigError(f"no rounding {rounding}; there are {', '.join(EVAL_ROUNDINGS)}")
    masks = model.learned_dropout.model_copy(update={"eval_rounding": rounding})
    return config.model_copy(update={"model": model.model_copy(update={"learned_dropout": masks})})
