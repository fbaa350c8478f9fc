"""Programs of ours without their start: a process that has imported all once forks itself for each call.

`call` is for tests; `python -IS tests/warm.py MODULE ARGUMENT…` for scripts, which find it as `duet` on their PATH.
The parent is `tests/parent.py`: one for all of a session's processes, begun at the first call. Standard library only,
and little of it: this is a program's start.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence

FOLDER = "DUET_TESTS_WARM"
"""The variable that holds the session's folder, in which the parent listens."""
_PREFIX = "duet-warm-"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def call(
    module: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], descriptors: Sequence[int],
    timeout: float | None = None,
) -> int:  # fmt: skip
    """What `python -P -m MODULE ARGUMENT…` would return: an exit code, or minus the signal that ended it.

    Without a `timeout` signals are passed on. Raises TimeoutError, and ends the program.
    """
    with start(module, arguments, cwd, environment, descriptors) as program:
        program.settimeout(timeout)
        if timeout is None:
            for number in FORWARDED:
                signal.signal(number, lambda number, frame: program.send(bytes([number])))
        return code_of(program)


def start(
    module: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], descriptors: Sequence[int]
) -> socket.socket:
    """Begin it: what is sent is a signal's number, what comes is the end, and to close it ends the program."""
    request = {"module": module, "arguments": list(arguments), "cwd": cwd, "environment": dict(environment)}
    program = _connect(environment[FOLDER])
    content = json.dumps(request).encode()
    socket.send_fds(program, [len(content).to_bytes(4, "little")], list(descriptors))
    program.sendall(content)
    return program


def code_of(program: socket.socket) -> int:
    """Wait for its end."""
    answer = program.recv(4)
    if not answer:
        raise EOFError(f"the parent is gone; its words are in {os.environ[FOLDER]}/log")
    return int.from_bytes(answer, "little", signed=True)


def command(module: str, *arguments: str) -> list[str]:
    """A process that is the program, for `subprocess.Popen`: its input and output, signals both ways, its end."""
    return [sys.executable, "-IS", __file__, module, *arguments]


def record(pid: int, words: Sequence[str]) -> None:
    """What a forked process is: its command line in /proc is that of its parent."""
    with open(f"{os.environ[FOLDER]}/programs/{pid}", "w", errors="surrogateescape") as file:
        file.write("\0".join([*words, *(f"{name}={value}" for name, value in os.environ.items())]))


def recorded(pid: int) -> list[str]:
    """Arguments and environment of a forked program."""
    with open(f"{os.environ[FOLDER]}/programs/{pid}", errors="surrogateescape") as file:
        return file.read().split("\0")


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Something that one of the session's processes does for all; `folder`: the session's."""
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def session() -> Iterator[None]:
    """The folder in which programs of this process, and of those that it starts, have their parent, for as long.

    What sessions that were killed have left is removed.
    """
    import shutil
    import tempfile
    from pathlib import Path

    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            os.kill(int((left / "session").read_text()), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):  # another user's, or it is just being made
            pass
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    Path(folder, "session").write_text(str(os.getpid()))
    os.environ[FOLDER] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder)


def _connect(folder: str) -> socket.socket:
    parent = socket.socket(socket.AF_UNIX)
    with locked(folder):
        if not os.path.exists(f"{folder}/socket"):  # noqa: PTH110 (an import)
            _begin(folder)
    parent.connect(f"{folder}/socket")
    return parent


def _begin(folder: str) -> None:
    import subprocess
    from pathlib import Path

    with open(f"{folder}/log", "w") as log:
        command = [sys.executable, "-m", "tests.parent", folder]
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    assert process.stdout
    with process.stdout as words:
        assert words.readline() == b"ready\n", Path(folder, "log").read_text()
    process.returncode = 0  # it outlives this process, and ends with the session


if __name__ == "__main__":
    code = call(sys.argv[1], sys.argv[2:], os.getcwd(), os.environ, (0, 1, 2))  # noqa: PTH109 (an import)
    if code < 0:
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
