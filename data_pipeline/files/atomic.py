"""Files that are either the old or the new, whatever happens in between. Standard library only."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import DataError, UserError

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
    errno.EIO: "the disk, or the server behind it, failed (input/output error; the kernel's log may say why)",
    errno.ESTALE: "the file server does not know it any more (stale file handle)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ELOOP: "a link stands there, or links that lead in a circle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EPERM: "not permitted",
}
"""What a system says to a path that a user named, whatever the program does."""


@contextmanager
def disk_errors(path: Path, kind: type[UserError] = DataError) -> Iterator[None]:
    """Turns what a disk can refuse while `path` is written into an error of `kind` that names it."""
    try:
        yield
    except OSError as error:
        why = DISK_ERRORS.get(error.errno or 0)
        if error.errno == errno.ENOENT and error.filename:  # as in /proc
            refused = Path(error.filename)
            if refused in path.parents or refused.parent == path.parent:
                why = "no file or folder can be made there"
        if why is None:
            raise
        raise kind(
            f"cannot write {path}: {why}. What was complete before still is; "
            "make room (or choose another place) and run the same command again"
        ) from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Has an OSError say that it is about `path`, not about a temporary file beside it, or about none: of what a full
    disk refuses the system names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and Path(os.fsdecode(error.filename)).parent != path.parent):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def check_writable(path: Path) -> None:
    """Raises DataError where no file could be written under this name, before what goes into it is made. The folder for
    it is made."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        tempfile.TemporaryFile(dir=path.parent).close()


def write_atomic(path: Path, content: str | bytes, private: bool = False) -> None:
    """Replaces a file: a temporary one beside it, flushed to disk, then renamed; a `private` one is for its owner.

    Raises DataError for what is no file, such as a device or a pipe, and for text that is not UTF-8, such as the name
    of a file may be; OSError, which names the file, when the disk refuses.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"cannot write {path}: it is a device or a pipe; name a file")
    if isinstance(content, str):
        content = _encoded(path, content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a process that was killed, or a link
    with named(path):
        try:
            with open(temporary, "xb", opener=partial(os.open, mode=0o600 if private else 0o666)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _encoded(path: Path, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[max(0, error.start - 60) : error.end + 20].splitlines()
        line = next(part for part in found if text[error.start] in part).strip()
        raise DataError(
            f"cannot write {path}: {line!a} in it is not UTF-8; give that file or folder another name"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by JSON, indented for people."""
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def open_lock(path: Path) -> BinaryIO:
    """A file to lock, made if it is not there; what is in it stays. A link is refused (OSError), since others may set
    one where they can write."""
    return open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666))


def sync_folder(folder: Path) -> None:
    """Makes names that were created in, renamed in or removed from `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
