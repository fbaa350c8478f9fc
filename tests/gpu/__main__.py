"""Run what only a GPU can prove: `python -m tests.gpu [--only a|b|PART …] [--out FOLDER] [--device cpu]`.

Part by part, each in a process of its own with its own time, in the order of worth, until the minutes are over. What is
found lies in the folder as soon as a part ends; a run with the same folder goes on with what is not done. Exit code 0:
all that was asked for is done and right.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import RunError, UserError
from tests.gpu.parts import ABSENT, NO_GPU, PARTS, Entry
from tests.gpu.results import DONE, PAGE, Result, Results
from tests.gpu.setting import ROOT

SLOWER = 10
"""Of a rehearsal."""
LEAST = 10.0
"""Seconds that must be left for a part to begin."""


@dataclass
class Started:
    """The process of a part that imports, and waits for its turn."""

    entry: Entry
    process: subprocess.Popen[str]
    rows: Path


class Runner:
    """Starts parts, one ahead, so that none waits for the imports of the next."""

    def __init__(self, results: Results, device: str, log: IO[str], folder: Path) -> None:
        self._results, self._device, self._log, self._folder = results, device, log, folder
        self._commit = _commit()

    def run(self, entries: Sequence[Entry], seconds: float) -> None:
        """All of them, as far as the time goes."""
        end, ahead = time.monotonic() + seconds, None
        for number, entry in enumerate(entries):
            left = end - time.monotonic()
            if left < LEAST:
                names = ", ".join(entry.name for entry in entries[number:])
                print(f"out of time; run again for: {names}", flush=True)
                break
            started = ahead if ahead else self._start(entry)
            ahead = self._start(entries[number + 1]) if number + 1 < len(entries) else None
            try:
                result = self._finish(started, left)
            except BaseException:
                for one in (started, ahead):
                    if one:
                        _end(one.process)
                raise
            self._results.add(entry.name, result)
            _tell(entry, result)
        if ahead:
            _end(ahead.process)

    def _start(self, entry: Entry) -> Started:
        rows = self._folder / f"{entry.name}.rows"
        words = [sys.executable, "-m", "tests.gpu.part", json.dumps(entry), self._device, str(self._folder), str(rows)]
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            start_new_session=True,  # so that its children end with it
        )
        return Started(entry, process, rows)

    def _finish(self, started: Started, left: float) -> Result:
        limit = min(left, started.entry.seconds * (SLOWER if self._device == "cpu" else 1))
        self._log.write(f"=== {started.entry.name}\n")
        self._log.flush()
        since, status, note = time.monotonic(), "", ""
        process = started.process
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its code says why
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.close()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code, status, note = 0, "out of time", f"{limit:.0f} s"
        _end(process)
        found = _content(started.rows)
        said = found.pop("note", "")
        if code == NO_GPU:
            raise RunError(said)
        if code == ABSENT:
            status, note = "left out", said
        elif not status:
            status, note = _judged(started.entry, code, found["rows"])
        return Result(status, time.monotonic() - since, self._device, self._commit, note, **found)


def _judged(entry: Entry, code: int, rows: list[dict[str, Any]]) -> tuple[str, str]:
    if code:
        return "broken", f"exit code {code}; see log.txt"
    if not rows:
        return "broken", "it gave no row"
    wrong = [row["name"] for row in rows if not row["ok"]]
    failed = [row for row in rows if not row["ok"] and row["value"] != row["value"]]
    if not wrong:
        return "passed", ""
    return "missed" if entry.section == "b" and not failed else "failed", "; ".join(wrong)[:300]


def _content(rows: Path) -> dict[str, Any]:
    """What a part has written, also one that was ended in the middle of a line."""
    found: dict[str, Any] = {"machine": {}, "rows": [], "reached": {}}
    if rows.exists():
        for line in rows.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                content = json.loads(line)
                found["rows"] += [content.pop("row")] if "row" in content else []
                found |= content
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tell(entry: Entry, result: Result) -> None:
    print(f"{entry.name:12} {result.status:12} {result.seconds:6.1f} s  {result.note}", flush=True)
    for row in result.rows:
        if entry.section == "b" or not row["ok"]:
            bound = "" if row["limit"] is None else f"  ({'>=' if row['at_least'] else '<='} {row['limit']:.3g})"
            print(f"    {row['name']}: {row['value']:,.4g} {row['unit']}{bound}  {row['note']}", flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def chosen(only: Sequence[str]) -> list[Entry]:
    """Parts by their section or their name, all unless some are named. Raises UserError."""
    known = {entry.section for entry in PARTS} | {entry.name for entry in PARTS}
    if unknown := set(only) - known:
        raise UserError(f"--only {' '.join(sorted(unknown))}: expected of {', '.join(sorted(known))}")
    return [entry for entry in PARTS if not only or {entry.section, entry.name} & set(only)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="a: is it right? b: how fast is it? or names of parts")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse, in tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all; not for a rehearsal")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--page", action="store_true", help="write results into docs/gpu.md and run nothing")
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    given = parser.parse_args()
    try:
        entries = chosen(given.only)
        if given.list:
            print("\n".join(f"{entry.section}  {entry.name:12} at most {entry.seconds:3} s" for entry in entries))
            return 0
        if given.page:
            Results(given.out).write_page(PAGE)
            return 0
        given.out.mkdir(parents=True, exist_ok=True)
        return _run(entries, Results(given.out), given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(entries: list[Entry], results: Results, given: argparse.Namespace) -> int:
    open_ = [entry for entry in entries if given.again or not results.is_done(entry, given.device)]
    with open(given.out / "log.txt", "a") as log, tempfile.TemporaryDirectory(prefix="duet-gpu-") as folder:
        seconds = 60 * given.minutes * (SLOWER if given.device == "cpu" else 1)
        Runner(results, given.device, log, Path(folder)).run(open_, seconds)
    (given.out / "table.md").write_text(results.table())
    if lines := results.missed_lines(given.device):
        print(f"{len(lines)} statements that run on CUDA alone were not reached:")
        print("\n".join(f"    {line}" for line in lines))
    print(f"results: {given.out / 'results.json'}, {given.out / 'table.md'}")
    missing = [entry.name for entry in entries if not results.is_done(entry, given.device)]
    slow = [
        entry.name for entry in entries if entry.name not in missing and results.parts[entry.name].status != DONE[0]
    ]
    return int(bool(missing or slow))


if __name__ == "__main__":
    sys.exit(main())
