"""Which checkpoints of a run stay: the newest, every K-th step's, the best, and those that other runs need."""

import math
from pathlib import Path

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.run.checkpoint_folder import complete, is_checkpoint, is_incomplete, named, needed_by, remove, step_of


def reasons(
    root: Path, keep: int, every: int | None, run: str | None = None, upto: int | None = None
) -> dict[Path, list[str]]:
    """Why each complete checkpoint stays, newest first; one with no reason may go.

    The newest `keep`; those of steps that are a multiple of `every`; the one with the lowest validation loss among
    those that were saved at a step with a validation; those that other runs need, whose adapters change them or which
    have yet to begin with them. These stay, too, and do not count: one that cannot be read (it may be of a newer
    version, or its disk may be away), one of another run than `run`, and one of a step after `upto`, which a run that
    saves at `upto` has passed over as damaged.
    """
    found: dict[Path, list[str]] = {}
    losses: dict[Path, float] = {}
    newest = 0
    for path in complete(root):
        try:
            manifest = CheckpointManifest.load(path)
        except CheckpointError:
            if is_checkpoint(path):  # else the run has removed it meanwhile
                found[path] = ["cannot be read"]
            continue
        if run and manifest.state.get("run", run) != run:
            found[path] = ["of another run"]
            continue
        if upto is not None and manifest.step > upto:
            found[path] = ["passed over"]
            continue
        newest += 1
        why = "newest" if newest == 1 else f"among the newest {keep}"
        found[path] = [why] if newest <= keep else []
        if every and manifest.step % every == 0:
            found[path].append(f"every {every}")
        found[path] += [f"needed by {by}" for by in needed_by(path)]
        loss = manifest.validation_loss
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    if losses:
        found[min(losses, key=losses.__getitem__)].append("best")
    return found


def prune(
    root: Path,
    keep: int,
    every: int | None,
    run: str | None = None,
    upto: int | None = None,
    dry_run: bool = False,
) -> list[Path]:
    """Remove the checkpoints that have no reason to stay, and what interrupted saves of earlier steps left.

    What is no checkpoint in a folder of its name (a copy of another step, a file, a link that leads nowhere) is not
    touched, and of a link to a checkpoint only the link goes.

    Returns:
        what was removed, or would be.

    Raises:
        CheckpointError: names what could not be removed; all else that was to go is gone.
    """
    found = reasons(root, keep, every, run, upto)
    last = upto or max((step_of(path) or 0 for path, why in found.items() if why), default=0)
    incomplete = [path for path in named(root) if (step_of(path) or 0) <= last and is_incomplete(path)]
    gone = sorted([path for path, why in found.items() if not why] + incomplete)
    failed = []
    for path in gone if not dry_run else []:
        try:
            remove(path)
        except OSError as error:
            failed.append(f"{path}: could not be removed: {error}")
    if failed:
        raise CheckpointError("\n".join(failed))
    return gone
