"""What ties a run to its dataset: the vocabulary in its configuration and the fingerprint in its folder.

Free of torch and pyarrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.config import told_names
from data_pipeline.errors import RunError
from data_pipeline.files.filesystem import is_uri
from data_pipeline.storage.manifest import Manifest
from pretrain.config.schema import Config


class HasManifest(Protocol):
    """A `data_pipeline.storage.dataset.Dataset`, or as much of it as a login node has."""

    @property
    def manifest(self) -> Manifest:
        """What is in it."""


@dataclass(frozen=True)
class Built:
    """As much of a dataset as a login node reads."""

    manifest: Manifest


def complete(config: Config, dataset: HasManifest) -> Config:
    """The configuration with the dataset's vocabulary, and with its place as an absolute path.

    Raises:
        RunError: the configuration asks for another vocabulary, or for other labels.
    """
    vocabulary = dataset.manifest.tokenizer.vocab_size
    if config.model.vocab_size not in (None, vocabulary):
        raise RunError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer of {config.data.path} has {vocabulary} "
            "pieces: another dataset. A run goes on with data of its own tokenizer only, as a new phase (data.phase); "
            "for these data start a new run: run.name=NEW model.vocab_size=null"
        )
    model = config.model.model_copy(update={"vocab_size": vocabulary} | _labels(config, dataset.manifest))
    path = config.data.path
    data = config.data.model_copy(update={"path": path if is_uri(path) else str(Path(path).resolve())})
    return config.model_copy(update={"model": model, "data": data})


def _labels(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Of a model that says labels, its head with those that the dataset holds."""
    head, told = config.model.label_head, manifest.labels
    if head is None or told is None:  # `Objective.check` says so
        return {}
    if head.kind != told.kind or (head.labels is not None and list(head.labels) != told.names):
        raise RunError(
            f"model.head says {_told(head.kind, head.labels)}, and {config.data.path} holds "
            f"{_told(told.kind, told.names)}; give model.head.kind={told.kind} model.head.labels=null"
        )
    return {"head": head.model_copy(update={"labels": tuple(told.names) or None})}


def _told(kind: str, names: Sequence[str] | None) -> str:
    return f"{kind} ({told_names(names)})" if names else kind


def identity(config: Config, dataset: HasManifest) -> dict[str, Any]:
    """What a run folder records of its dataset; `order0_entropy` in bits per byte of the validation text."""
    manifest = dataset.manifest
    return {
        "path": config.data.path,  # not that of a copy on a node's disk
        "fingerprint": manifest.fingerprint,
        "tokens": manifest.splits["train"].tokens,
        "order0_entropy": manifest.splits["validation"].order0_entropy(),
    }
