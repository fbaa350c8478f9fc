"""A folder of files on a node's own disk that were fetched from afar: shared by its processes, bounded in bytes.

Files are named by a hash of their content, so none is ever stale. One that is being fetched is NAME.part, which its
writer has locked; renamed when it is complete. One that is read is locked, shared, and is not removed meanwhile. Locks
are flock's, which end with the process that holds them: what a killed one leaves is taken over by the next.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, open_lock
from data_pipeline.files.private import own_folder

_PART = ".part"


class CachedFile(NamedTuple):
    """A complete file. It may be removed once `lease` is closed."""

    path: Path
    lease: BinaryIO


class ShardCache:
    """Files by name; those least recently used go when there is no room."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit`: bytes of all files, those being fetched included. Raises DataError if the folder cannot be made, or
        others can write there."""
        self.folder = own_folder(folder)
        self.limit = limit

    def find(self, name: str) -> CachedFile | None:
        """The file `name`, if it is there."""
        path = self.folder / name
        found = _locked(path, fcntl.LOCK_SH)
        if found is None:
            return None
        os.utime(path)
        return CachedFile(path, found)

    def get(self, name: str, size: int, fill: Callable[[BinaryIO], object], wait: bool = True) -> CachedFile | None:
        """The file `name`, written by `fill` if it is not there; None if another process fetches it and not `wait`.

        Raises what `fill` raises, and DataError if there is no room or the disk refuses.
        """
        path = self.folder / name
        with disk_errors(path):
            while True:
                if found := self.find(name):
                    return found
                part = _locked(path.with_name(name + _PART), fcntl.LOCK_EX, create=True, wait=wait)
                if part is None:
                    if not wait:
                        return None
                    continue  # Another process finished it, or removed what a third one left.
                with part:
                    self._fill(part, path, size, fill)

    def discard(self, name: str) -> bool:
        """Removes the file `name`; whether it could, since nobody reads it."""
        return _remove(self.folder / name)

    def _fill(self, part: BinaryIO, path: Path, size: int, fill: Callable[[BinaryIO], object]) -> None:
        temporary = Path(part.name)
        if path.exists():
            temporary.unlink()
            return
        try:
            self._reserve(temporary, size)
            fill(part)
            part.flush()
            os.fsync(part.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)

    def _reserve(self, part: Path, size: int) -> None:
        """Makes room, and gives the file its size so that others count it."""
        with open_lock(self.folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for file in self.folder.iterdir():
                try:
                    status = file.stat()
                except FileNotFoundError:  # Renamed by the process that fetched it.
                    continue
                found.append((status.st_mtime_ns, status.st_size, file))
            free = self.limit - sum(held for _, held, file in found if file != part)
            for _, held, file in sorted(found):
                if free >= size:
                    break
                if held and file != part and _remove(file):
                    free += held
            if free < size:
                raise DataError(
                    f"no room for {size} bytes in {self.folder}: its limit is {self.limit} bytes, and what is there is "
                    "in use; raise data.cache_bytes"
                )
            os.truncate(part, size)


def _locked(path: Path, kind: int, create: bool = False, wait: bool = True) -> BinaryIO | None:
    """The file at `path`, opened and locked; None if there is none, it went meanwhile, or another process has it."""
    try:
        file = open_lock(path) if create else open(path, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _remove(path: Path) -> bool:
    """Whether it could be removed: nobody uses it."""
    found = _locked(path, fcntl.LOCK_EX, wait=False)
    if found is None:
        return False
    with found:
        path.unlink()
    return True
