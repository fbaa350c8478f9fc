"""What the parts found, in a folder: `results.json`, written anew whole after each part, and its table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import write_atomic
from tests.gpu.lines import cuda_only, missed, named
from tests.gpu.parts import PARTS, Entry
from tests.gpu.setting import ROOT

DONE = ("passed", "missed")
"""How a part ends that need not run again: right, or right and slower than hoped for."""
FILE = "results.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- results: written by python -m tests.gpu --page -->\n", "<!-- end -->\n"


@dataclass
class Result:
    """Of a part."""

    status: str
    """`passed`; `failed`: a row is not what it must be; `missed`: a speed is not; `broken`: it raised or gave nothing;
    `out of time`; `left out`: a package is missing."""
    seconds: float
    device: str
    """`cuda` or `cpu`."""
    commit: str
    note: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    reached: dict[str, list[int]] = field(default_factory=dict)
    """Lines, by what `lines.named` makes of files."""


class Results:
    """By the names of parts."""

    def __init__(self, folder: Path) -> None:
        """Reads those of before. Raises RunError when they cannot be read."""
        self._file = folder / FILE
        self.parts: dict[str, Result] = {}
        if self._file.exists():
            try:
                self.parts = {name: Result(**found) for name, found in json.loads(self._file.read_text()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{self._file}: no results of make gpu ({error}); take another --out") from error

    def is_done(self, entry: Entry, device: str) -> bool:
        found = self.parts.get(entry.name)
        return found is not None and found.device == device and found.status in DONE

    def add(self, name: str, result: Result) -> None:
        """On the disk when it returns."""
        self.parts[name] = result
        text = json.dumps({name: found.__dict__ for name, found in self.parts.items()}, indent=1)
        write_atomic(self._file, text.encode())

    def missed_lines(self, device: str) -> list[str]:
        """Lines that run on CUDA alone and that no part has reached."""
        wanted = cuda_only()
        reached: dict[str, set[int]] = {named(file): set() for file in wanted}
        for found in self.parts.values():
            for file, lines in found.reached.items() if found.device == device else ():
                reached.setdefault(file, set()).update(lines)
        return list(missed(wanted, {file: reached[named(file)] for file in wanted}))

    def write_page(self, page: Path) -> None:
        """Put the table into it. Raises RunError when there is something that no GPU has found, or nothing."""
        rehearsed = [name for name, found in self.parts.items() if found.device != "cuda"]
        if rehearsed or not self.parts:
            told = f"{', '.join(rehearsed)} ran on a CPU" if rehearsed else "there is nothing"
            raise RunError(f"{self._file}: {told}; the page tells what a GPU has found")
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + BEGIN + self.table() + END + rest.partition(END)[2])

    def table(self) -> str:
        """Markdown: each part, and each of its rows; the machines in front."""
        machines = {json.dumps(found.machine): found for found in self.parts.values() if found.machine}
        lines = ["; ".join(f"{key} {value}" for key, value in found.machine.items()) for found in machines.values()]
        lines += ["", "| part | measured | value | claimed | |", "|---|---|---|---|---|"]
        for entry in PARTS:
            if found := self.parts.get(entry.name):
                lines.append(
                    f"| **{entry.name}** | {found.seconds:.0f} s, commit {found.commit} | | | {_cell(found)} |"
                )
                lines += [_row(row) for row in found.rows]
        return "\n".join(lines) + "\n"


def _cell(found: Result) -> str:
    return found.status + (f": {_plain(found.note)}" if found.note else "")


def _row(row: dict[str, Any]) -> str:
    claimed = "" if row["limit"] is None else ("at least " if row["at_least"] else "at most ") + f"{row['limit']:.3g}"
    said = _plain(row["note"]) if row["ok"] else f"**no** {_plain(row['note'])}".strip()
    return f"| | {_plain(row['name'])} | {row['value']:,.4g} {row['unit']} | {claimed} | {said} |".replace("  ", " ")


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
