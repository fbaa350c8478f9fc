"""Whose a checkpoint is: it names the run that saved it, by the id in that run's folder."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import Config
from pretrain.run.run_folder import RunFolder

COMPARED = ("run.name", "run.seed", "model.", "batch.tokens", "optimizer.", "schedule.kind")
"""Keys that tell whose a checkpoint is that does not name its run: no resume may change them."""


def check_own(checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Whether a checkpoint is of the run that its folder belongs to.

    The id goes with a run folder that is moved or copied. Older checkpoints do not name it: their configuration must
    be the run's.

    Raises:
        CheckpointError: it is another run's; names the way on.
    """
    theirs, ours = checkpoint.manifest.state.get("run"), folder.facts().get("id")
    if theirs and ours:
        why = "" if theirs == ours else f"run {theirs[:8]}, here is {ours[:8]}"
    else:
        why = _difference(checkpoint.manifest.state.get("config"), folder.config())
    if why:
        raise CheckpointError(
            f"{checkpoint.path}: of another run ({why}); move it away, and to go on from it in a new run, name the "
            f"folder of the run that saved it: duet train --from RUN@{checkpoint.manifest.step} run.name=NEW"
        )


def _difference(saved: Any, config: Config) -> str:
    """The first key of both in which they differ; a checkpoint that holds no configuration is no other run's."""
    theirs, ours = dict(_flat(saved)), dict(_flat(config.model_dump(mode="json")))
    for key in sorted(theirs.keys() & ours.keys()):
        if key.startswith(COMPARED) and theirs[key] != ours[key]:
            return f"{key}={theirs[key]} there, {ours[key]} here"
    return ""


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
