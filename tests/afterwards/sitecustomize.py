"""Put into PYTHONPATH, this has the trainer's report take its time, fail, or be the death of rank 0.

AFTERWARDS is JSON: {"go": a file that the report waits for, or "seconds": S, "then": "write", "raise" or "kill"}. The
file FOLDER/reporting, beside run folder, says that the report has begun. GRACE is the launcher's, in seconds.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _slow(report: ModuleType) -> None:
    orders, write = json.loads(os.environ.get("AFTERWARDS", "{}")), report.write

    def slow_write(runs: list[Any], out: Path) -> None:
        (out.parent.parent / "reporting").touch()
        end = time.monotonic() + orders.get("seconds", 0)
        while time.monotonic() < end or ("go" in orders and not Path(orders["go"]).exists()):
            time.sleep(0.02)
        if orders.get("then") == "raise":
            raise ValueError("no font")
        if orders.get("then") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        write(runs, out)

    report.write = slow_write  # type: ignore[attr-defined]


def _hasty(local: ModuleType) -> None:
    local.GRACE_SECONDS = float(os.environ.get("GRACE", "15"))  # type: ignore[attr-defined]


CHANGES = {"pretrain.report.report": _slow, "launch.local.local_ranks": _hasty}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the real module, and changes it once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for what is not changed."""
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
