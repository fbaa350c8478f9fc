"""One part, in this process: `python -m tests.gpu.part ENTRY DEVICE FOLDER ROWS`, which the runner starts before its
turn.

It imports what it needs, waits for a line on standard input, and writes a line of JSON for each row as it comes, at the
end one with the lines that it reached. Exit codes: ABSENT where a package is not here, NO_GPU; the reason is in ROWS.
"""

import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tests.gpu.lines import Tracer, cuda_only, named
from tests.gpu.parts import ABSENT, NO_GPU, Entry
from tests.gpu.setting import Setting, as_json


def main(entry: Entry, setting: Setting, rows: Path) -> None:
    with open(rows, "w", buffering=1) as out:
        if missing := [package for package in entry.needs if importlib.util.find_spec(package) is None]:
            _write(out, note=f"needs {', '.join(missing)}")
            sys.exit(ABSENT)
        os.environ.setdefault("OMP_NUM_THREADS", "1" if setting.tiny else "4")
        module, _, function = entry.target.partition(":")
        run = getattr(importlib.import_module(module), function)
        if not sys.stdin.readline():  # the runner is gone before its turn
            return
        if setting.device == "cuda" and not _has_gpu():
            _write(out, note="torch finds no GPU here; --device cpu rehearses")
            sys.exit(NO_GPU)
        _write(out, machine=_machine(setting.device))
        with _traced(entry, out):
            for row in run(setting):
                _write(out, row=as_json(row))


@contextmanager
def _traced(entry: Entry, out: IO[str]) -> Iterator[None]:
    """Nothing is traced that is timed."""
    if entry.section != "a":
        yield
        return
    with Tracer(cuda_only()) as tracer:
        try:
            yield
        finally:
            _write(out, reached={named(file): sorted(lines) for file, lines in tracer.reached.items() if lines})


def _write(out: IO[str], **content: Any) -> None:
    out.write(json.dumps(content) + "\n")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _machine(device: str) -> dict[str, str]:
    name = f"{os.cpu_count()} CPU cores"
    if device == "cuda":
        import torch

        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = {package: version(package) for package in ("torch", "deepspeed")}
    return {"device": name, **versions, "Python": platform.python_version()}


if __name__ == "__main__":
    given, device, folder, file = sys.argv[1:]
    main(Entry(*json.loads(given)), Setting(device, Path(folder)), Path(file))
