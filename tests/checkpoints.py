"""What tests do to checkpoints."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.files.sealed import seal, unseal
from pretrain.run.checkpoint_folder import MANIFEST, UNSEALED_FORMATS


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest's content, without its hash."""
    return unseal((folder / MANIFEST).read_bytes(), formats=())


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """As the program would: with a hash, unless the format has none."""
    text = json.dumps(content, indent=1)
    (folder / MANIFEST).write_text(text if content["format"] in UNSEALED_FORMATS else seal(text))


def age(folder: Path) -> None:
    """Make a checkpoint one of the third format, which named no run and had no hash of the manifest."""
    content = manifest_of(folder)
    content["state"].pop("run", None)
    write_manifest(folder, content | {"format": 3})
