"""Folders of a user's own where others can write, too: /tmp, a node's scratch. Standard library only."""

import contextlib
import os
import stat
from pathlib import Path

from data_pipeline.errors import DataError, UserError
from data_pipeline.files.atomic import disk_errors


def own_folder(path: Path, kind: type[UserError] = DataError, given: bool = False) -> Path:
    """Makes a folder for this user alone, unless it is there; whoever else could write to it would choose what is
    trained on, or run code in this user's name.

    `given`: the user named it, so it may be a link of theirs, or root's.

    Raises `kind` if it is a link, another user's, or others can write to it.
    """
    with disk_errors(path, kind):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    me, found = os.getuid(), path.lstat()
    trusted = (me, 0) if given else (me,)
    if given and stat.S_ISLNK(found.st_mode) and found.st_uid in trusted:
        found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
    elif found.st_uid not in trusted:
        what = "another user's"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = "open to others, who can write there (chmod go-w closes it, once you have looked at what is in it)"
    else:
        return path
    raise kind(f"{path} is {what}: name a folder of your own instead (TMPDIR, DUET_CACHE, data.cache)")
