"""Work on several processes of one machine: results in order, progress, and nothing left running."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar

from data_pipeline.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Told of bytes that are done."""

_TELL_BYTES = 2**20


def run(
    function: Callable[[Item, Advance], Result], items: Iterable[Item], processes: int, advance: Advance
) -> Iterator[Result]:
    """`function(item, advance)` of each item, in the order of `items`; here if `processes` is 1.

    `function` and the items must be picklable. Raises what it raises, in the first process that fails; the others are
    ended then, as they are when the caller stops listening. They end by themselves if this process is killed.
    """
    if processes == 1:
        for item in items:
            yield function(item, advance)
        return
    with _Crew(function, processes) as crew:
        yield from crew.run(iter(items), advance)


class _Crew(Generic[Item, Result]):
    """Processes that wait for items, each at the other end of a pipe."""

    def __init__(self, function: Callable[[Item, Advance], Result], processes: int) -> None:
        self._function = function
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["data_pipeline.stages"])
        self._size = processes
        self._members: dict[Connection, ForkServerProcess] = {}

    def __enter__(self) -> "_Crew[Item, Result]":
        return self

    def __exit__(self, *exception: object) -> None:
        for connection, process in self._members.items():
            connection.close()
            process.terminate()
        for process in self._members.values():
            process.join()

    def run(self, items: Iterator[Item], advance: Advance) -> Iterator[Result]:
        ready: dict[int, Result] = {}
        begun = given = 0
        busy: dict[Connection, int] = {}
        idle: list[Connection] = []
        exhausted = False
        while True:
            while given in ready:
                yield ready.pop(given)
                given += 1
            # Not so far ahead that results gather behind a slow item.
            while not exhausted and len(busy) < self._size and begun - given < 4 * self._size:
                try:
                    item = next(items)
                except StopIteration:
                    exhausted = True
                    break
                connection = idle.pop() if idle else self._hire()
                try:
                    connection.send(item)
                except BrokenPipeError:
                    raise self._death(connection) from None
                busy[connection] = begun
                begun += 1
            if not busy:
                return
            spoke = wait(list(busy))
            for connection in [member for member in busy if member in spoke]:
                match self._receive(connection):
                    case "advance", size:
                        advance(size)
                    case "result", result:
                        ready[busy.pop(connection)] = result
                        idle.append(connection)
                    case "error", error:
                        raise error

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        process.start()
        theirs.close()
        self._members[ours] = process
        return ours

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death(connection) from None

    def _death(self, connection: Connection) -> DataError:
        process = self._members[connection]
        process.join()
        return DataError(
            f"a worker process ended with exit code {process.exitcode} (-9: killed, often for want of memory); the "
            "units that were finished are kept: run the same command again, perhaps with fewer --processes"
        )


def _serve(function: Callable[[Any, Advance], Any], connection: Connection) -> None:
    untold = 0

    def advance(size: int) -> None:
        nonlocal untold
        untold += size
        if untold >= _TELL_BYTES:
            connection.send(("advance", untold))
            untold = 0

    # A closed pipe: the parent is gone, or wants no more.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            item = connection.recv()
            try:
                result = function(item, advance)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("error", error))
                return
            connection.send(("advance", untold))
            untold = 0
            connection.send(("result", result))


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))
