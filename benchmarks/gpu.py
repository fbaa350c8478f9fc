"""How fast it is on one GPU: the parts b of `python -m tests.gpu`, which runs each in a process of its own.

By itself, `python benchmarks/gpu.py [--json]` has that run all of them, for at most 20 minutes. Without a GPU nothing
is measured. Exits with 1 when a target is missed. The parts stand in `benchmarks/on_gpu/`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    if not torch.cuda.is_available():
        print("no GPU that torch could use is here: nothing was measured", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "tests.gpu", "--only", "b", "--minutes", str(MINUTES), "--out", folder]
        code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr).returncode
        parts = json.loads(Path(folder, "results.json").read_text()).values()
        rows = [row for part in parts for row in part["rows"]]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| | value | target |\n|---|---|---|")
        for row in rows:
            kind = "at least" if row["at_least"] else "at most"
            target = "–" if row["limit"] is None else f"{kind} {row['limit']:.3g}"
            print(f"| {row['name']} ({row['note']}) | {row['value']:.4g} | {target} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
