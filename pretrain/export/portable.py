"""An export: a trained model in one folder that needs neither the run nor its data.

model.safetensors  config.json  spm.model or tokenizer.json  EXPORT.txt

Beside them lies what transformers needs (`hugging_face/`), and of an architecture that is not ours its source, in
architecture/.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import CheckpointError, DataError
from data_pipeline.files.atomic import disk_errors, sync_folder, write_atomic, write_json
from data_pipeline.places import EXPORT, mistaken
from data_pipeline.tokenize.tokenizer import JSON, MODEL, Tokenizer, model_file, model_name
from model.architectures import external, registry
from model.architectures.names import current_name
from model.architectures.registry import AnyModelConfig
from model.layers.int8 import in_int8, restored
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.shard_file import write_tensors
from pretrain.config.architecture import keep
from pretrain.config.schema import Config, model_from
from pretrain.export.hugging_face.folder import (
    About,
    dataset_of,
    hugging_face_config,
    rows_of,
    texts_of,
    write_for_transformers,
)
from pretrain.export.hugging_face.sources import check_alone
from pretrain.finetune.lora import linear_maps
from pretrain.inference.trained import Trained, chat_template_of, tokenizer_of, whole_weights
from pretrain.objectives.registry import ObjectiveName
from pretrain.run.checkpoint_folder import MANIFEST
from pretrain.run.origin import TRAIN, WEIGHTS

FORMAT = 2
"""In the first, an architecture's parameters had no `backbone.` before their names."""
CONFIG = "config.json"
Dtype = Literal["fp32", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""Of what is not in int8: linear maps are, but those of masks."""
NOTE = """\
A model trained with Duet: run {run}, step {step}.
Weights in {dtype} (model.safetensors), configuration (config.json), tokenizer ({tokenizer}).

README.md says how it is used, by Duet itself, too.
"""


class ExportFacts(BaseModel, extra="forbid", frozen=True):
    """What Duet reads of config.json, under `duet`."""

    format: int = FORMAT
    model: AnyModelConfig
    objective: ObjectiveName
    run: str
    step: int = Field(strict=True)
    commit: str | None
    """Of the program that trained it."""
    dataset: str | None
    """Fingerprint of the data it was trained on."""
    chat_template: str | None = None
    """As the dataset of conversations had it; None: it learned from none."""


def write_export(
    checkpoint: Checkpoint,
    config: Config,
    folder: Path,
    dtype: Dtype = "fp32",
    weights: Mapping[str, Tensor] | None = None,
    loss: float | None = None,
) -> None:
    """Write a checkpoint's model into a new folder, which is there whole or not at all.

    The same weights give the same bytes, whatever wrote the checkpoint. Parameters are rounded to `dtype`, buffers are
    not; the tied head is the token table, which is in the file once. In int8 are linear maps, but those of masks,
    since a small change of an angle flips what is kept.

    Args:
        weights: parameters and buffers in the place of the checkpoint's, where `config` is of a model that was made
            from it.
        loss: over all held-out text, of what is written, where that is not the checkpoint's model in fp32.

    Raises:
        CheckpointError: the folder is there already or cannot be written; the checkpoint is of another model.
        DataError: the run's dataset has no tokenizer, or another one.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    file, tokenizer = tokenizer_of(checkpoint, config)
    if weights is None:
        with torch.device("meta"):
            model = registry.build(config.model)
        shapes = {name: list(values.shape) for name, values in model.named_parameters()}
        weights = whole_weights(checkpoint, config, shapes)
    dataset = dataset_of(checkpoint, config)
    about = rows_of(checkpoint, config, dataset, loss)
    texts = texts_of(dataset, tokenizer)
    tensors = {**checkpoint.buffers(), **weights}
    write_folder(folder, _facts(checkpoint, config), tensors, (file.read_bytes(), tokenizer), texts, about, dtype)


def write_folder(
    folder: Path,
    facts: ExportFacts,
    tensors: Mapping[str, Tensor],
    tokenizer: tuple[bytes, Tokenizer],
    texts: Iterable[str] | DataError,
    rows: Mapping[str, str],
    dtype: Dtype = "fp32",
) -> None:
    """Write an export: parameters and buffers, a tokenizer with its file's content, and what else `About` tells.

    Raises:
        CheckpointError: it cannot be written; the code of the architecture cannot be copied.
    """
    with torch.device("meta"):
        model = registry.build(facts.model)
    shapes = {name: values.shape for name, values in model.named_parameters()}
    kept = {name: values.to(DTYPES[dtype]) if name in shapes else values for name, values in tensors.items()}
    maps = [name for name, (_, of_mask) in linear_maps(model) if not of_mask] if dtype == "int8" else []
    kept = in_int8(kept, maps)
    metadata = {"format": "pt"} | {name: str(getattr(facts, name)) for name in ("run", "step", "commit", "dataset")}
    content, opened = tokenizer
    written = facts.model_dump(mode="json", exclude={"chat_template"} if facts.chat_template is None else None)
    written["model"]["architecture"] = external.without_folder(facts.model.architecture)
    told = {**rows, "weights": dtype}
    size = model.num_parameters()
    about = About(facts.model, facts.objective, facts.run, size, told, opened, content, texts, facts.chat_template)
    with new_folder(folder) as new:
        write_tensors(new / WEIGHTS, dict(sorted(kept.items())), Event(), metadata)
        theirs = hugging_face_config(facts.model, facts.objective, type_name(dtype), opened.eos_id)
        write_json(new / CONFIG, theirs | ({"int8": maps} if maps else {}) | {"duet": written})
        write_for_transformers(new, about)
        write_atomic(new / TRAIN, _train(facts))
        if external.is_external(facts.model.architecture):
            keep(facts.model, new)
            check_alone(new, written["model"], shapes)
        note = NOTE.format(run=facts.run, step=facts.step, dtype=dtype, tokenizer=model_name(content))
        write_atomic(new / "EXPORT.txt", note)


def _train(facts: ExportFacts) -> str:
    """The configuration of a run that begins with an export: its model, whose weights are trained on."""
    shape = facts.model.model_dump(mode="json")
    if external.is_external(facts.model.architecture):
        shape["architecture"] = f"{external.FOLDER}/{external.without_folder(facts.model.architecture)}"
    found = {"model": shape, "data": {"objective": facts.objective}, "finetune": {"kind": "full"}}
    return f"# duet train --from FOLDER data.path=DATA run.name=NAME\n{yaml.safe_dump(found, sort_keys=False)}"


def type_name(dtype: Dtype) -> str:
    """What torch calls it."""
    return str(DTYPES[dtype]).removeprefix("torch.")


def _facts(checkpoint: Checkpoint, config: Config) -> ExportFacts:
    state = checkpoint.manifest.state
    return ExportFacts(
        model=config.model,
        objective=config.data.objective,
        run=config.run.name,
        step=checkpoint.manifest.step,
        commit=state.get("commit"),
        dataset=state.get("data", {}).get("fingerprint"),
        chat_template=chat_template_of(checkpoint),
    )


def is_export(folder: Path) -> bool:
    """Whether it looks like one."""
    try:
        return (folder / CONFIG).is_file() and not os.path.lexists(folder / MANIFEST)
    except OSError:  # it may not be looked into
        return False


def load_export(folder: Path) -> Trained:
    """What `write_export` wrote.

    Raises:
        CheckpointError: not an export, of a newer version, or damaged.
        DataError: the tokenizer is missing or damaged.
    """
    facts = read_facts(folder)
    shape = facts.model
    if isinstance(shape, external.Recorded):
        shape = external.open_recorded(shape, [folder])
    model = registry.build(shape)
    try:
        weights = {current_name(name): values for name, values in load_file(folder / WEIGHTS).items()}
        model.load_state_dict(restored(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: missing, damaged, or of another model: {error}") from error
    file = model_file(folder)
    if not file.is_file():
        raise CheckpointError(f"{folder}: no tokenizer ({MODEL} or {JSON}); export it again")
    return Trained(model.eval(), Tokenizer.load(file), facts.objective, facts.run, facts.step, facts.chat_template)


def read_facts(folder: Path) -> ExportFacts:
    """Of an export. Raises CheckpointError as `load_export` does."""
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text())["duet"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if told := mistaken(folder, EXPORT):
            raise CheckpointError(f"{folder}: {told}") from None
        raise CheckpointError(f"{file}: missing, damaged, or not of an export of Duet: {error!r}") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found not in (1, FORMAT):
        raise CheckpointError(f"{file}: format {found} is not known here; this version reads 1 and {FORMAT}")
    try:
        return ExportFacts.model_validate(raw | {"model": model_from(raw.get("model"))})
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its name when all is in it."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder, CheckpointError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        try:
            yield new
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        sync_folder(folder.parent)
