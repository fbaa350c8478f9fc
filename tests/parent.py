"""The parent of programs in tests: imports once what they import, and forks itself for each (see `tests/warm.py`).

What a program starts of ours (`python -P -m MODULE`), its ranks for one, is forked, too: from the program itself, so
that it is its child, as it must be.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests import warm

IMPORTED = (
    *("deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "torch.profiler._cupti_monitor"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.backends.backend_agg", "matplotlib.figure"),
    *("launch.cli", "launch.local.local_ranks", "launch.local.study_runs", "mlflow", "mlflow.tracking"),
    *("pretrain.__main__", "pretrain.report.report", "pretrain.trainer", "rich.live", "torch._dynamo"),
)
"""Else each program imports them, or each rank."""
MODULES = ("launch.cli", "launch.local.study_runs", "pretrain")
"""What is started without a new interpreter."""


def serve(folder: Path) -> None:
    """Fork a program for each connection, until the session's process is gone."""
    session = os.pidfd_open(int((folder / "session").read_text()))
    from pretrain.engine.engine import bootstrap

    bootstrap()
    for name in IMPORTED:
        importlib.import_module(name)
    for file in sorted(Path(__file__).parent.glob("distributed/*cases*.py")):
        importlib.import_module(f"tests.distributed.{file.stem}")
    import torch

    torch.set_num_threads(1)
    subprocess.Popen = Forked  # type: ignore[misc]
    gc.collect()
    gc.freeze()  # else DeepSpeed's many collections walk through all that was imported: 0.3 s each
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    (folder / "programs").mkdir()
    print("ready", flush=True)
    os.dup2(2, 1)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, lambda: Program(listener.accept()[0], selector))
        selector.register(session, selectors.EVENT_READ, sys.exit)
        while True:
            for key, _ in selector.select():
                key.data()


class Program:
    """A fork that became what a client asked for, until it ends."""

    def __init__(self, client: socket.socket, selector: selectors.BaseSelector) -> None:
        head, descriptors, _, _ = socket.recv_fds(client, 4, 3)
        with client.makefile("rb") as file:
            request = json.loads(file.read(int.from_bytes(head, "little")))
        self.pid = os.fork()
        if self.pid == 0:
            _guarded(_become, descriptors, **request)
        for descriptor in descriptors:
            os.close(descriptor)
        self._client: socket.socket | None = client
        self._selector = selector
        self._end = os.pidfd_open(self.pid)
        selector.register(self._end, selectors.EVENT_READ, self._ended)
        selector.register(client, selectors.EVENT_READ, self._heard)

    def _heard(self) -> None:
        """Signals; with the client all that the program started is ended."""
        if self._client is None:  # it ended in the same moment
            return
        numbers = self._client.recv(64)
        for number in numbers:
            os.kill(self.pid, number)
        if not numbers:
            os.kill(self.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._leave()

    def _ended(self) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._selector.unregister(self._end)
        os.close(self._end)
        if self._client:
            with suppress(BrokenPipeError):
                self._client.sendall(code.to_bytes(4, "little", signed=True))
            self._leave()

    def _leave(self) -> None:
        assert self._client
        self._selector.unregister(self._client)
        self._client.close()
        self._client = None


def _become(
    descriptors: Sequence[int], module: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str]
) -> NoReturn:
    """This process becomes the program that a client asks for, in a session of its own."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the parent
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    kept = [os.dup(descriptor) for descriptor in descriptors]
    for ours, theirs in enumerate(kept):
        os.dup2(theirs, ours)
    os.chdir(cwd)
    _run(module, arguments, environment, ())


class Forked(subprocess.Popen[Any]):
    """`python -P -m MODULE ARGUMENT…` of a module of ours is a fork; all else is started as ever."""

    def __init__(self, args: Any, *rest: Any, **named: Any) -> None:
        if args[:3] == [sys.executable, "-P", "-m"] and args[3] in MODULES:
            environment = named.get("env") or os.environ
            # Called where the new program would be executed: its descriptors, folder and session are made.
            named["preexec_fn"] = functools.partial(
                _guarded, _run, args[3], args[4:], dict(environment), named.get("pass_fds", ())
            )
        super().__init__(args, *rest, **named)


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> NoReturn:
    """As `python -P -m MODULE ARGUMENT…` in a new process, to its end."""
    low = 3
    for kept in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
        os.closerange(low, kept)
        low = kept + 1
    os.environ.clear()
    os.environ |= environment
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    tempfile.tempdir = None
    source, arguments = (arguments[0], arguments[1:]) if module == "-c" else ("", arguments)
    sys.argv = [module, *arguments]
    warm.record(os.getpid(), sys.argv)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", errors=errors, buffering=1, closefd=False)  # noqa: SIM115 (to the end)
        for number, mode, errors in ((0, "r", "surrogateescape"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    for name in (module, f"{module}.__main__"):
        sys.modules.pop(name, None)  # else runpy warns of it
    if module == "pretrain":  # the pictures take longer than all the steps of a small run
        from pretrain.report import report

        report.write = lambda runs, out: None
    code: Any = 0
    try:
        if module == "-c":
            exec(source, {"__name__": "__main__"})
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _guarded(function: Callable[..., NoReturn], *arguments: Any, **named: Any) -> NoReturn:
    """Whatever happens: a fork never goes on with what its parent was doing."""
    try:
        function(*arguments, **named)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
