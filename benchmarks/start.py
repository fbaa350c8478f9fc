"""CPU seconds before and after the work: until a training's first step ends, until a model answers, of a report.

Each is measured beside what cannot be avoided, a process that imports torch, or torch and DeepSpeed, in turn; one rank,
one thread of OpenMP. Commands run as a user starts them, with MLflow on. Exits with 1 when a target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = 5
TICKS = os.sysconf("SC_CLK_TCK")
DUET = [sys.executable, "-P", "-m", "launch.cli"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        # Bytecode is kept, as everywhere but where this variable is set: else our modules alone would be compiled anew.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder, "bytecode"))
        rows = measure(Path(folder))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at most |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
    return int(any(row["ratio"] > row["target"] for row in rows))


def measure(folder: Path) -> list[dict[str, Any]]:
    """A run that lasts is made first; all are measured in turn, so that what else the machine does hits all alike."""
    data, run = folder / "data", folder / "run"
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    check([*DUET, "data", "build", "data/characters", source, f"data.path={data}"])
    model = ["model/tiny", "run/quickstart", f"data.path={data}"]
    check([*DUET, "train", *model, f"run.dir={run}", "train.steps=200", "train.log_every=1", "batch.tokens=128"])
    ways: dict[str, Callable[[int], float]] = {
        "import torch": lambda _: until(b"imported", imports("import torch")),
        "import torch and DeepSpeed": lambda _: until(b"imported", imports("import torch, deepspeed")),
        "train, until step 1 ends": lambda number: to_first_step(model, folder / f"run-{number}"),
        "generate, until the model is loaded": lambda _: until(
            b"Licence", [*DUET, "generate", str(run), "--prompt", "Licence"]
        ),
        "eval of 1,136 tokens": lambda _: until(b"loss/val", [*DUET, "eval", str(run)]),
        "the report of 13 plots": lambda _: whole([*DUET, "report", str(run)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(RUNS + 1):
        for name, way in ways.items():
            taken = way(number)
            if number:  # the first reads files from the disk, and writes bytecode
                seconds[name].append(taken)
    return [
        compare(seconds, "train, until step 1 ends", "import torch and DeepSpeed", 1.3),
        compare(seconds, "generate, until the model is loaded", "import torch", 1.5),
        compare(seconds, "eval of 1,136 tokens", "import torch", 1.5),
        compare(seconds, "the report of 13 plots", "import torch", 2.0),
    ]


def compare(seconds: dict[str, list[float]], what: str, floor: str, target: float) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(seconds[what], seconds[floor], strict=True)]
    told, under = statistics.median(seconds[what]), statistics.median(seconds[floor])
    return {
        "name": f"{what} ({told:.2f} CPU s) / {floor} ({under:.2f})",
        "ratio": statistics.median(ratios),
        "target": target,
    }


def check(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def whole(command: list[str]) -> float:
    """CPU seconds of a process and of those that it waited for."""
    before = os.times()
    check(command)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def imports(statement: str) -> list[str]:
    return [sys.executable, "-P", "-c", f"{statement}; print('imported', flush=True); input()"]


def until(said: bytes, command: list[str]) -> float:
    """CPU seconds when a process says this. Then it is killed."""
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
        assert process.stdout
        heard = b""
        while said not in heard:
            more = os.read(process.stdout.fileno(), 4096)
            assert more, f"{command} ended with {heard!r}"
            heard += more
        taken = used(process.pid)
        process.kill()
    return taken


def to_first_step(model: list[str], run: Path) -> float:
    """CPU seconds of launcher and rank when the journal has step 1. Then they are asked to stop."""
    command = [*DUET, "train", *model, f"run.dir={run}", "train.steps=2"]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = run / "metrics.jsonl"
    while not (journal.exists() and b"loss/total" in journal.read_bytes()):
        assert launcher.poll() is None, f"ended with code {launcher.returncode}"
        time.sleep(0.005)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    taken = sum(used(pid) for pid in (launcher.pid, *map(int, children)))
    launcher.terminate()
    launcher.wait()
    return taken


def used(pid: int) -> float:
    """CPU seconds of a process that runs, and of those that it waited for; proc(5), in the order of `stat`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


if __name__ == "__main__":
    sys.exit(main())
