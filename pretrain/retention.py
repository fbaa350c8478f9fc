"""Which checkpoints of a run stay: the newest, every K-th step's, the best."""

import math
from pathlib import Path

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint import Checkpoint, complete, remove, step_of


def reasons(root: Path, keep: int, every: int | None) -> dict[Path, list[str]]:
    """Why each complete checkpoint stays, newest first; one with no reason may go.

    The newest `keep`; those of steps that are a multiple of `every`; the one with the lowest validation loss among
    those that were saved at a step with a validation. One that cannot be read stays, too, and does not count: it may
    be of a newer version, or its disk may be away.
    """
    found: dict[Path, list[str]] = {}
    losses: dict[Path, float] = {}
    newest = 0
    for path in complete(root):
        try:
            loss = Checkpoint(path).manifest.validation_loss
        except CheckpointError:
            found[path] = ["cannot be read"]
            continue
        newest += 1
        found[path] = ["newest"] if newest <= keep else []
        if every and step_of(path) % every == 0:
            found[path].append(f"every {every}")
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    if losses:
        found[min(losses, key=losses.__getitem__)].append("best")
    return found


def prune(root: Path, keep: int, every: int | None, dry_run: bool = False) -> list[Path]:
    """Remove the checkpoints that have no reason to stay, and what interrupted saves of earlier steps left.

    Returns:
        what was removed, or would be.

    Raises:
        CheckpointError: names what could not be removed.
    """
    kept = {path for path, why in reasons(root, keep, every).items() if why}
    newest = max((step_of(path) for path in kept), default=0)
    gone = sorted(path for path in root.glob("step-*") if path not in kept and step_of(path) <= newest)
    for path in gone:
        if not dry_run:
            try:
                remove(path)
            except OSError as error:
                raise CheckpointError(f"{path}: could not be removed: {error}") from error
    return gone
