"""What a command of `duet` takes beside what it cannot avoid, in CPU seconds from start to end.

The floors are programs that do nothing with what they start: Python with typer and pydantic, a command called and a
class of two fields checked; the same program asked for help; with the classes of the configuration, for commands that
read one; with torch, too.
A command and its floor take turns. Exits with 1 when a target is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OLDER = Path(__file__).resolve().parent.parent / "tests" / "formats" / "2026-11"
REPEATS = 5
MOST = 1.5
PROGRAM = """
{more}
import typer
from pydantic import BaseModel

class Facts(BaseModel):
    name: str
    number: int = 1

app = typer.Typer(rich_markup_mode="markdown")

@app.command()
def show(name: str) -> None:
    typer.echo(Facts(name=name).name)

@app.command()
def other() -> None:
    pass

app(["show", {word!r}])
"""
SCHEMA = "import pretrain.config.schema"
START, HELP, CONFIGURATION, TORCH = ("", "name"), ("", "--help"), (SCHEMA, "name"), (f"import torch\n{SCHEMA}", "name")
NAMES = {START: "start", HELP: "help", CONFIGURATION: "configuration", TORCH: "configuration, torch"}
LARGEST = ("model/gpt-3-175b", "model.vocab_size=50257")
COMMANDS = {
    "--help": HELP,
    "train --help": HELP,
    "--version": START,
    "config presets": START,
    "runs ls runs": START,
    "status runs": START,
    "config show model/tiny": CONFIGURATION,
    f"model params {' '.join(LARGEST)}": CONFIGURATION,
    f"model flops {' '.join(LARGEST)}": CONFIGURATION,
    f"plan {' '.join(LARGEST)} batch.tokens=2097152 --gpus 1024 --gpu h100 engine.zero_stage=3": CONFIGURATION,
    "checkpoint ls runs/first": CONFIGURATION,
    "checkpoint inspect runs/first": CONFIGURATION,
    "checkpoint verify runs/first": TORCH,
    "generate exported --prompt The --tokens 5": TORCH,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(OLDER / "trained" / "decoder_only", Path(folder, "runs", "first"))
        shutil.copytree(OLDER / "exports" / "decoder_only", Path(folder, "exported"))
        rows = [row(command, floor, Path(folder)) for command, floor in COMMANDS.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| duet … | seconds | floor | seconds | ratio | at most |\n|---|---|---|---|---|---|")
        for found in rows:
            print(
                f"| `{found['name']}` | {found['seconds']:.2f} | {found['floor']} | {found['floor_seconds']:.2f} | "
                f"{found['ratio']:.2f} | {found['target']} |"
            )
    return int(any(found["ratio"] > MOST for found in rows))


def row(command: str, floor: tuple[str, str], folder: Path) -> dict[str, Any]:
    ours = [str(Path(sys.executable).with_name("duet")), *command.split()]
    theirs = [sys.executable, "-P", "-c", PROGRAM.format(more=floor[0], word=floor[1])]
    seconds = [(cpu_seconds(ours, folder), cpu_seconds(theirs, folder)) for _ in range(REPEATS)]
    mine, least = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "name": command,
        "seconds": mine,
        "floor": NAMES[floor],
        "floor_seconds": least,
        "ratio": mine / least,
        "target": MOST,
    }


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Of a process until it ends, user and system."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1), said.decode()  # 1: `duet plan` says that it does not fit
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
