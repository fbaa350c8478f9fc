"""Where a run's checkpoints lie, one folder a step, and which of them count. Free of torch.

A folder counts when it is named after a step and holds a manifest of that very step. Whatever else is called `step-…`
(a copy, an archive, a file, a link that leads nowhere) is passed over by all who look for checkpoints.
"""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from data_pipeline.errors import CheckpointError
from data_pipeline.files.atomic import sync_folder, write_atomic
from data_pipeline.files.sealed import unseal
from data_pipeline.places import DATASET, kind_of

MANIFEST = "manifest.json"
FORMAT = 4
"""The third had no hash of the manifest, the second no buffers."""
OLDEST_FORMAT = 1
"""Which had AdamW only and did not name the states."""
UNSEALED_FORMATS = (1, 2, 3)

T = TypeVar("T")
_NEEDED_BY, _TO_BEGIN = "needed-by-", "-to-begin"
"""Files in a checkpoint that begin with the first name a run each, which needs it to begin only if they end so, too."""
_NAME = re.compile(r"step-([0-9]{9,})")
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class MisnamedError(CheckpointError):
    """A folder is named after another step than its manifest."""


def step_path(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step-{step:09d}"


def step_of(path: Path) -> int | None:
    """The step that a folder is named after; None for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found and step_path(path.parent, int(found[1])) == path else None


def complete(root: Path, warn: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Folders that count, newest step first; `warn` hears why others do not.

    One whose manifest is damaged, or may not be read, is among them: who opens it learns what is wrong.

    Raises:
        CheckpointError: `root` is there and cannot be listed.
    """
    found, paths = [], named(root)
    for path in paths:
        try:
            (path / MANIFEST).lstat()
            read_manifest(path)
        except MisnamedError as error:
            warn(f"checkpoint passed over: {error}")
            continue
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                if os.path.lexists(path) and not path.is_dir():  # else it is what an interrupted save left, or gone
                    warn(f"{path}: passed over: no folder, or a link to one that is not there")
                continue
        except CheckpointError:
            pass
        found.append(path)
    if not found and named(root) != paths:  # a run that trains has saved, and let go of what was there
        return complete(root, warn)
    return found


def while_there(choose: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """What `read` makes of the checkpoint that is chosen; of the one that is chosen next, should a run that trains
    remove it meanwhile.

    Raises:
        CheckpointError: one that is there cannot be read; and what `choose` raises.
    """
    while True:
        path = choose()
        try:
            return read(path)
        except CheckpointError:
            if is_checkpoint(path):
                raise


def named(root: Path) -> list[Path]:
    """What is named after a step, newest first, whatever it is.

    Raises:
        CheckpointError: `root` is there and cannot be listed.
    """
    try:
        paths = list(root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed: {error.strerror}") from error
    steps = {path: step for path in paths if (step := step_of(path)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Content of a checkpoint's manifest, without its hash.

    Raises:
        MisnamedError: it is whole, and of another step than the folder's name says.
        CheckpointError: missing, damaged, altered, or of a newer version.
    """
    file = path / MANIFEST
    content = _read(file)
    found = content.get("format")
    if found not in range(OLDEST_FORMAT, FORMAT + 1):
        raise CheckpointError(
            f"{file}: format {found} is not known here; this version reads {OLDEST_FORMAT} to {FORMAT}"
        )
    named_after, step = step_of(path), content.get("step")
    if named_after is not None and isinstance(step, int) and step != named_after:
        raise MisnamedError(
            f"{path}: its manifest is of step {step}, so it is a copy, or was renamed; {step_path(path.parent, step)} "
            "is its name"
        )
    return content


def remove(path: Path) -> None:
    """Remove a checkpoint: first what makes it one, then the rest. Of a link, and of a file, nothing but itself.

    Raises:
        OSError: something stays. It is a checkpoint no more, unless not even its manifest could be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def hold(path: Path, run: Path, *, to_begin: bool = False) -> None:
    """Note in a checkpoint that it is needed as long as the folder of a run is there, or, `to_begin`, is there without
    a checkpoint of its own.

    Raises:
        OSError, DataError: it cannot be noted.
    """
    name = f"{_NEEDED_BY}{xxhash.xxh3_64_hexdigest(os.fsencode(run))}{_TO_BEGIN if to_begin else ''}"
    write_atomic(path / name, f"{run}\n")


def needed_by(path: Path) -> list[str]:
    """Folders of the runs that need a checkpoint; one that cannot be read, or looked at, counts as in need."""
    found = []
    for note in sorted(path.glob(f"{_NEEDED_BY}*")):
        try:
            run = note.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError):
            run = str(note)
        if run == str(note) or _may_need(Path(run), to_begin=note.name.endswith(_TO_BEGIN)):
            found.append(run)
    return found


def _may_need(run: Path, *, to_begin: bool) -> bool:
    """Whether a run folder is there, or may be, as one of somebody else's that is closed; and has still to begin."""
    try:
        (run / "run.json").stat()
        return not (to_begin and complete(run / "checkpoints"))
    except CheckpointError:
        return True
    except OSError as error:
        return error.errno not in _NOTHING_THERE


def make_room(path: Path, warn: Callable[[str], None]) -> None:
    """Have nothing stand where a step is to be saved: what a crash left, or a damaged checkpoint, is removed.

    What cannot be removed, and a copy of another step, is set aside under another name; `warn` hears of it.

    Raises:
        OSError: not even that.
    """
    why = ""
    try:
        read_manifest(path)
    except MisnamedError:
        why = "a copy of another step's"
    except CheckpointError:
        pass
    if not why:
        try:
            remove(path)
            return
        except OSError as error:
            why = f"cannot be removed: {error.strerror}"
    warn(f"{path}: stood where the step is saved ({why}); it is now {set_aside(path)}")


def set_aside(path: Path) -> Path:
    """Give a checkpoint another name, under which it is none of the run's. Returns that; raises OSError."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    path.rename(aside)
    return aside


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint: it has a manifest, or the name of one and cannot be looked into. A dataset,
    which has a manifest of its own, is none."""
    if os.path.lexists(path / MANIFEST):
        return kind_of(path) != DATASET
    return step_of(path) is not None and os.path.lexists(path) and not os.access(path, os.X_OK)


def is_incomplete(path: Path) -> bool:
    """Whether it is a folder without a manifest: what an interrupted save left, or what is being saved."""
    with suppress(OSError):
        if not path.is_symlink() and path.is_dir():
            return MANIFEST not in os.listdir(path)
    return False


def check_file(file: Path) -> int:
    """Size of a file of a checkpoint.

    Raises:
        CheckpointError: it is missing, cannot be looked at, or is no file.
    """
    try:
        found = file.stat()
    except OSError as error:
        missing = error.errno in _NOTHING_THERE
        raise CheckpointError(f"{file}: {'missing' if missing else f'cannot be read: {error.strerror}'}") from error
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
        raise CheckpointError(f"{file}: not a file")
    return found.st_size


def _read(file: Path) -> dict[str, Any]:
    if is_incomplete(file.parent):
        raise CheckpointError(f"{file.parent}: no complete checkpoint (no {MANIFEST})")
    check_file(file)
    try:
        return unseal(file.read_bytes(), formats=(FORMAT,))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None
