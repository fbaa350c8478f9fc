"""Work on several processes of one machine: results in order, progress, and nothing left running."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

from data_pipeline.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Told of bytes that are done."""

_TELL_BYTES = 2**20
_PRELOAD = ["data_pipeline.building.api", "sentencepiece.sentencepiece_model_pb2"]
"""What every process needs is imported once, before they are forked."""


class Crew:
    """Processes that wait for work, each at the other end of a pipe: hired when there is work for two, kept from stage
    to stage with what they have loaded, until they are dismissed. They end by themselves if this process is killed."""

    def __init__(self, size: int) -> None:
        """`size`: processes at most; 1: all is done in this one."""
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._members: dict[Connection, ForkServerProcess] = {}

    def expect(self, items: int) -> None:
        """Says that there will be work of so many items: what takes time to start is started."""
        if min(self.size, items) > 1:
            self._context.set_forkserver_preload(_PRELOAD)
            forkserver.ensure_running()

    def dismiss(self) -> None:
        """Ends the processes; more work would be for others."""
        for connection, process in self._members.items():
            connection.close()
            process.terminate()
        for process in self._members.values():
            process.join()
        self._members.clear()

    def run(
        self, function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance
    ) -> Iterator[Result]:
        """`function(item, advance)` of each item, in the order of `items`; here if that is no work for two.

        `function` and the items must be picklable. Raises what it raises, in the first process that fails; the crew is
        dismissed then, as it is when the caller stops listening.
        """
        if min(self.size, len(items)) <= 1:
            for item in items:
                yield function(item, advance)
            return
        self.expect(len(items))
        try:
            yield from self._run(function, items, advance)
        except BaseException:
            self.dismiss()
            raise

    def _run(
        self, function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance
    ) -> Iterator[Result]:
        ready: dict[int, Result] = {}
        begun = given = 0
        busy: dict[Connection, int] = {}
        idle, told = list(self._members), set[Connection]()
        while given < len(items):
            # Not so far ahead that results gather behind a slow item.
            while begun < min(len(items), given + 4 * self.size) and len(busy) < self.size:
                connection = idle.pop() if idle else self._hire()
                try:
                    connection.send((None if connection in told else function, items[begun]))
                except (BrokenPipeError, ConnectionResetError):
                    raise self._death(connection) from None
                told.add(connection)
                busy[connection] = begun
                begun += 1
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
            while given in ready:
                yield ready.pop(given)
                given += 1

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
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


def _serve(connection: Connection) -> None:
    untold = 0
    function: Callable[[Any, Advance], Any] | None = None

    def advance(size: int) -> None:
        nonlocal untold
        untold += size
        if untold >= _TELL_BYTES:
            connection.send(("advance", untold))
            untold = 0

    # A closed pipe: the parent is gone, or wants no more.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            told, item = connection.recv()
            function = told or function
            assert function is not None
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
