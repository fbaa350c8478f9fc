"""Models in layouts that others know (`layouts.py`): written from a checkpoint, and read to begin a run with."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import CheckpointError, ConfigError, DataError
from data_pipeline.files.atomic import write_json
from data_pipeline.places import EXPORT
from data_pipeline.places import kind_of as kind_of_folder
from data_pipeline.tokenize.fast_tokenizer import without_surroundings
from data_pipeline.tokenize.tokenizer import JSON, MODEL, Tokenizer
from model.architectures import registry
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.shard_file import write_tensors
from pretrain.config.schema import Config
from pretrain.export.hugging_face.folder import (
    About,
    dataset_of,
    kind_of,
    rows_of,
    texts_of,
    write_card,
    write_tokenizer,
)
from pretrain.export.layouts import LAYOUTS, check_fits, read_shape, to_ours, to_theirs
from pretrain.export.portable import CONFIG, DTYPES, Dtype, ExportFacts, new_folder, type_name, write_folder
from pretrain.finetune.base import weights_of
from pretrain.inference.trained import chat_template_of, tokenizer_of
from pretrain.objectives.registry import objective_of
from pretrain.run.origin import WEIGHTS

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TEMPLATE = "duet_chat_template"
"""Of config.json: how messages are written, as `data.chat_template` has it; transformers keeps it there."""
_TOKENIZERS = (MODEL, JSON, "tokenizer.model")
"""Ours lies beside a tokenizer.json that gives the same tokens."""


def import_model(folder: Path, to: Path) -> DecoderOnlyConfig:
    """Make an export of ours of a folder of Llama's or GPT-2's layout: what a run begins with (`duet train --from`).

    Rows of the token table that the tokenizer has no token for are left out: nothing could read or write them.

    Raises:
        CheckpointError: it does not fit; names the first field or tensor that does not. `to` is there already.
        DataError: it has no tokenizer, or one that is not fit for training.
    """
    if to.exists():
        raise CheckpointError(f"{to}: is there already; name a new folder")
    if kind_of_folder(folder) == EXPORT:
        raise CheckpointError(
            f"{folder}: this is an export already; `duet train --from {shlex.quote(str(folder))}` begins with it"
        )
    name, config, weights, template = _read(folder)
    file = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder}: no tokenizer ({', '.join(_TOKENIZERS)}), without which no text can be read")
    tokenizer, rows = Tokenizer.load(file), len(weights["token_embed.weight"])
    tokenizer.check_ids(str(file))
    if tokenizer.vocab_size > rows:
        count = f"{file.name} has {tokenizer.vocab_size} tokens"
        raise CheckpointError(f"{folder}: vocab_size={rows} does not fit its tokenizer: {count}")
    weights["token_embed.weight"] = weights["token_embed.weight"][: tokenizer.vocab_size].clone()
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    facts = ExportFacts(
        model=config,
        objective="causal" if template is None else "conversations",
        run=folder.resolve().name,
        step=0,
        commit=None,
        dataset=None,
        chat_template=template,
    )
    told = {"imported from": f"{folder.resolve().name}, in the layout of {name}"}
    write_folder(to, facts, weights, (file.read_bytes(), tokenizer), [*_spelled(tokenizer)], told, "fp32")
    return config


def _read(folder: Path) -> tuple[str, DecoderOnlyConfig, dict[str, Tensor], str | None]:
    """Layout, configuration, weights and our chat template of a folder."""
    try:
        raw = json.loads((folder / CONFIG).read_text())
        if not isinstance(raw, dict) or not isinstance(raw.get(TEMPLATE, ""), str):
            raise ValueError(f"not an object, or {TEMPLATE} no text")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: missing or damaged: {error}") from None
    name, shape = read_shape(raw, folder)
    try:
        config = registry.configure(shape)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    assert isinstance(config, DecoderOnlyConfig)
    weights = to_ours(_tensors(folder), config, name, folder)
    with torch.device("meta"):
        wanted = {key: values.shape for key, values in registry.build(config).state_dict().items()}
    for key in sorted(wanted.keys() | weights.keys()):
        found = _shape(weights.get(key))
        if found != wanted.get(key):
            raise CheckpointError(f"{folder}: {key} is {found}, and config.json makes it {wanted.get(key)}")
    return name, config, weights, raw.get(TEMPLATE)


def check_layout(config: Config, name: str) -> DecoderOnlyConfig:
    """Raises ConfigError that names the first key of a run that a layout cannot have."""
    fits = check_fits(config.model, name)
    if not objective_of(config.data.objective).continues_text:
        raise ConfigError(
            f"data.objective={config.data.objective} does not fit --layout {name}: the model reads a prefix both ways, "
            "and that layout reads none so; leave --layout out"
        )
    return fits


def write_standard(
    checkpoint: Checkpoint, config: Config, folder: Path, name: str, dtype: Dtype = "fp32", loss: float | None = None
) -> None:
    """Write a checkpoint's model into a new folder in a layout that others know; `loss` as `write_export` has it.

    Raises:
        ConfigError: it does not fit; names the first key that does not.
        CheckpointError, DataError: as `write_export`.
    """
    fits = check_layout(config, name)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    file, tokenizer = tokenizer_of(checkpoint, config)
    dataset = dataset_of(checkpoint, config)
    rows = rows_of(checkpoint, config, dataset, loss) | {"layout": name, "weights": dtype}
    weights = weights_of(checkpoint, config)
    parameters = sum(values.numel() for values in weights.values())
    texts, content = texts_of(dataset, tokenizer), without_surroundings(file.read_bytes())
    template = chat_template_of(checkpoint)
    about = About(fits, config.data.objective, config.run.name, parameters, rows, tokenizer, content, texts, template)
    tensors = {key: values.to(DTYPES[dtype]) for key, values in to_theirs(weights, fits, name).items()}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    with new_folder(folder) as new:
        write_tensors(new / WEIGHTS, dict(sorted(tensors.items())), Event(), {"format": "pt"})
        kept = {} if template is None else {TEMPLATE: template}
        write_json(new / CONFIG, LAYOUTS[name].config(fits) | ids | {"dtype": type_name(dtype)} | kept)
        fast, note = write_tokenizer(new, about)
        if not fast:  # the library of those who take this layout reads the file as it is
            (new / "tokenizer_config.json").unlink()
        kind = kind_of(fits, config.data.objective)
        notes = [f"A text has {fits.context} tokens at most.", *([note] if template else [])]
        write_card(new, about, kind, notes, standard=True)


def _shape(values: Tensor | None) -> Any:
    return None if values is None else values.shape


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    """Of one file or of several, with GPT-2's prefix where it was left out."""
    try:
        names = [SINGLE]
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        found = {key: values for name in names for key, values in load_file(folder / Path(name).name).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no weights in safetensors, or damaged: {error}") from None
    short = "wte.weight" in found
    return {f"transformer.{key}" if short and key != "lm_head.weight" else key: found[key] for key in found}


def _spelled(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of all its tokens."""
    for first in range(0, tokenizer.vocab_size, 64):
        yield tokenizer.decode(range(first, min(first + 64, tokenizer.vocab_size)))
