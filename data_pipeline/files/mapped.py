"""Memory-mapped files that shrink, or fail, while they are read: the kernel sends SIGBUS, whose usual end tells nobody
which file it was.

Only a handler can tell, and the read that failed cannot be gone on with. Python's own handlers run when the interpreter
comes to it, which here is never, so this one is libc's, and calls Python at once: the fault is in a copy or in a hash,
where the interpreter's state is whole. Standard library only.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from data_pipeline.errors import DataError, UserError

_mapped: WeakKeyDictionary[Any, tuple[Path, int]] = WeakKeyDictionary()
_ends: list[Callable[[Exception], object]] = []


def remember(owner: Any, path: Path, size: int) -> None:
    """As long as `owner` lives, so many bytes of a file are mapped."""
    _mapped[owner] = (path, size)


def shrunk() -> DataError | None:
    """An error that names a mapped file that is shorter than it was when it was mapped, if there is one."""
    for path, size in list(_mapped.values()):
        try:
            now = path.stat().st_size
        except OSError:  # removed: what is mapped stays
            continue
        if now < size:
            return DataError(
                f"{path} was truncated while it was read: {now} bytes, {size} before; restore it from a copy, or run "
                "`duet data build --overwrite`"
            )
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Where another rank died of a file that shrank, this says so instead of that it is gone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if found := shrunk():
            raise found from error
        raise


@contextmanager
def told(end: Callable[[Exception], object]) -> Iterator[None]:
    """While this is entered, a fault calls `end` with its error, the last entered first, and ends the process: with
    code 2 if a file was truncated, else by SIGBUS."""
    ctypes.CDLL(None).signal(signal.SIGBUS, _handler)
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(number: int) -> None:
    error: Exception = shrunk() or OSError(
        "a memory-mapped file could not be read (SIGBUS), and none is shorter than it was: the disk or its file system "
        "failed, see the kernel's log"
    )
    for end in reversed(_ends):
        try:
            end(error)
        except Exception:  # The others shall hear of it, too.
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, DataError):
        os._exit(2)
    ctypes.CDLL(None).signal(signal.SIGBUS, None)
    os.kill(os.getpid(), signal.SIGBUS)
