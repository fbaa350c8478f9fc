"""What a folder is, by the files that make it one: for errors about one that stands where another is wanted.

Standard library only: every room may import this leaf.
"""

import shlex
from contextlib import suppress
from pathlib import Path

RUN, CHECKPOINT, EXPORT, DATASET = "run folder", "checkpoint", "export", "dataset"
MODEL = "model as transformers saves it"


def kind_of(folder: Path) -> str | None:
    """One of the five; None for any other folder, for what is none, and where one may not look."""
    with suppress(OSError):
        if (folder / "run.json").is_file():
            return RUN
        if (folder / "EXPORT.txt").is_file():
            return EXPORT
        if (folder / "manifest.json").is_file():
            if (folder / "tokenizer").is_dir():
                return DATASET
            if any(folder.glob("shard-*.safetensors")):
                return CHECKPOINT
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return MODEL
    return None


def mistaken(folder: Path, wanted: str) -> str | None:
    """What is said of a folder that is one of the five, and not what is `wanted`; None of any other folder."""
    kind = kind_of(folder)
    if kind is None or kind == wanted:
        return None
    look = {
        DATASET: f"`duet data inspect {shlex.quote(str(folder))}` looks into it",
        EXPORT: f"`duet generate {shlex.quote(str(folder))}` takes it",
        CHECKPOINT: f"`duet checkpoint inspect {shlex.quote(str(folder))}` looks into it",
        MODEL: f"`duet checkpoint import {shlex.quote(str(folder))} --to NEW` makes an export of it",
        RUN: f"`duet config show {shlex.quote(str(folder / 'config.yaml'))}` names its dataset: data.path",
    }
    this, other = (f"{'an' if name == EXPORT else 'a'} {name}" for name in (kind, wanted))
    return f"this is {this}, and {other} is wanted; {look[kind]}"
