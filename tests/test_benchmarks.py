"""The way through all benchmarks: whatever one of them does, the others run, and the end names what was missed."""

import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TABLE = """print("| medians | ratio | {kind} |\\n|---|---|---|")
print("{rows}")
raise SystemExit({code})"""
SCRIPTS = {
    "a_crash": "raise OSError('no disk')",
    "b_least": TABLE.format(
        kind="at least", rows="| slow | 0.90 | 1.0 |\\n| quick | 1.10 | 1.0 |\\n| free | 0.1 | – |", code=1
    ),
    "c_each": TABLE.format(
        kind="target", rows="| big | 7 | at most 6 |\\n| far | 7 | at least 6 |\\n| gone | no | none |", code=1
    ),
    "d_met": TABLE.format(kind="at most", rows="| fine | 1.00 | 1.0 |", code=0),
}


def test_every_benchmark_runs_and_the_end_names_what_was_missed(tmp_path: Path) -> None:
    shutil.copy(BENCHMARKS / "__main__.py", tmp_path)
    for name, script in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(script)

    done = subprocess.run([sys.executable, tmp_path], capture_output=True, text=True)

    assert done.returncode == 1 and "OSError: no disk" in done.stderr
    assert [line for line in done.stdout.splitlines() if " of 4)" in line] == [
        f"{name} ({number} of 4)" for number, name in enumerate(SCRIPTS, 1)
    ]
    told = done.stdout.partition("1 of 4 benchmarks met every target, in 0.0 minutes.")[2]
    assert told.split("|---|---|---|\n")[1].splitlines() == [
        "| a_crash | 0.0 | ended with code 1: see above |",
        "| b_least | 0.0 | slow: 0.90, at least 1.0 |",
        "| c_each | 0.0 | big: 7, at most 6 |",
    ]
    only = subprocess.run([sys.executable, tmp_path, "--only", "d_met"], capture_output=True, text=True)
    assert only.returncode == 0 and "a_crash" not in only.stdout
