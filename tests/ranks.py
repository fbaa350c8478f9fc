"""Ranks for tests: started by the fixture `ranks` as a program of `tests/parent.py`, which has imported all.

Its argument is JSON: {"target": "module:function", "args": {…}, "world": 2, "timeout": s}. Every rank calls
function(ranks: Ranks, **args); the answer, JSON on standard output, holds their JSON results in rank order.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

GRACE = 30.0
"""Seconds for the other ranks to notice that one has failed; then they are ended."""


def _run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pids = [_fork(rank, request, Path(folder)) for rank in range(request["world"])]
        codes = _wait(pids, request["timeout"])
        outputs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(len(pids))]
        results = [Path(folder) / f"{rank}.json" for rank in range(len(pids))]
        if any(codes):
            return {"codes": codes, "outputs": outputs}
        return {"codes": codes, "outputs": outputs, "results": [json.loads(r.read_text()) for r in results]}


def _fork(rank: int, request: dict[str, Any], folder: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the parent
        if os.getppid() != parent:
            os._exit(1)
        log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as StopRequest does, before there are threads
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["world"])}
        os.environ["DUET_RENDEZVOUS"] = f"file://{folder}/store"
        from pretrain.engine.distributed import join

        module, function = request["target"].split(":")
        with join(timeout_minutes=2) as ranks:
            result = getattr(importlib.import_module(module), function)(ranks, **request["args"])
        (folder / f"{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], timeout: float) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid]:
                        end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
