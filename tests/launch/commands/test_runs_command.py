"""`duet runs ls` on a login node, where there is neither torch nor a GPU."""

import subprocess
import sys
from pathlib import Path

from pretrain.run.journal import Journal
from tests.runs import ROOT

PROGRAM = """
import sys
for name in ("torch", "mlflow", "pyarrow", "deepspeed", "sentencepiece", "matplotlib"):
    sys.modules[name] = None
sys.argv = ["duet", "runs", "ls", {folder!r}]
from launch.cli import main
main()
"""


def test_listing_runs_needs_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    journal = Journal(tmp_path / "a" / "metrics.jsonl", 1)
    journal.event("start", resumed_from=None)
    journal.metrics(3, {"loss/train": 2.5})
    program = PROGRAM.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:5] == [str(tmp_path / "a"), "dead", "3", "2.5000", "-"]
