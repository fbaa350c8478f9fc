"""Every benchmark in turn, in a process of its own, and at the end which targets were missed.

A benchmark that fails does not keep the others from running. Exits with 1 when a target was missed or one failed.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(script.stem for script in FOLDER.glob("*.py") if script.stem != "__main__")
LIMITS = {"at least": float.__lt__, "at most": float.__gt__}
"""What a value is to its limit where it misses it."""


class Ended(NamedTuple):
    """A benchmark that ended."""

    name: str
    minutes: float
    missed: list[str]
    """Rows, or that it failed; none where every target was met."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks", description=__doc__)
    names = ", ".join(NAMES)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {names}")
    chosen = parser.parse_args().only
    ended: list[Ended] = []
    try:
        for number, name in enumerate(chosen, 1):
            print(f"\n{name} ({number} of {len(chosen)})\n", flush=True)
            ended.append(run(name))
    except KeyboardInterrupt:
        print("\nstopped")
    show(ended)
    return int(len(ended) < len(chosen) or any(one.missed for one in ended))


def run(name: str) -> Ended:
    """With what it says passed on as it comes."""
    since, lines = time.monotonic(), []
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    rows = list(missed(lines))
    if process.returncode not in (0, 1) or (process.returncode and not rows):
        rows.append(f"ended with code {process.returncode}: see above")
    return Ended(name, (time.monotonic() - since) / 60, rows)


def missed(lines: Iterable[str]) -> Iterator[str]:
    """Rows of tables whose last column is a limit, and the one before it beyond it: `name: value, at most limit`."""
    kind = ""
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            kind = ""
        elif cells[-1] in (*LIMITS, "target"):
            kind = cells[-1]
        elif kind:
            # Under `target` each cell says its own kind.
            beyond, limit = (kind, cells[-1]) if kind in LIMITS else cells[-1].rpartition(" ")[::2]
            if beyond in LIMITS and LIMITS[beyond](value_of(cells[-2]), value_of(limit)):
                yield f"{cells[0]}: {cells[-2]}, {beyond} {limit}"


def value_of(cell: str) -> float:
    """NaN, which is beyond no limit, where a cell holds words."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def show(ended: list[Ended]) -> None:
    minutes = sum(one.minutes for one in ended)
    met = sum(not one.missed for one in ended)
    print(f"\n{met} of {len(ended)} benchmarks met every target, in {minutes:.1f} minutes.")
    if met < len(ended):
        print("\n| benchmark | minutes | missed |\n|---|---|---|")
        for one in ended:
            for row in one.missed:
                print(f"| {one.name} | {one.minutes:.1f} | {row} |")


if __name__ == "__main__":
    sys.exit(main())
