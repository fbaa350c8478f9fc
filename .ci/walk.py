"""Goes the way of a newcomer: what README and tutorial say, from a fresh clone in a new environment, with the seconds.

    python .ci/walk.py [FOLDER]

FOLDER is new and stays; else all is gone in the end. `make test` and what needs a cluster or a wheel are left out. Ends
with 1 at the first command that fails. Standard library only.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/tutorial.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("make test", "pip install")


def walk(folder: Path) -> int:
    """Clone into `folder` and run all; the exit code."""
    clone = folder / "duet"
    commands = [f"git clone --quiet {ROOT} {clone}", "make setup"]
    for page in PAGES:
        for block in BLOCK.findall((ROOT / page).read_text()):
            commands += [line for line in block.splitlines() if not line.startswith(ELSEWHERE)]
    inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment = inherited | {"PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    for command in dict.fromkeys(commands):
        start = time.monotonic()
        where = clone if clone.exists() else folder
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=where,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"{time.monotonic() - start:7.1f} s  {command[:100]}", flush=True)
        if done.returncode:
            print(f"it ended with {done.returncode}:\n{done.stdout}")
            return 1
    print(f"{time.monotonic() - began:7.1f} s  all of it")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        place = Path(sys.argv[1]).absolute()
        place.mkdir(parents=True)
        sys.exit(walk(place))
    with tempfile.TemporaryDirectory() as name:
        sys.exit(walk(Path(name)))
