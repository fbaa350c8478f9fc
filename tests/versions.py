"""Two versions of the program side by side: do they learn the same, bit for bit?"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from pretrain.checkpoint.differences import shape_differences, tensor_differences
from pretrain.inference.trained import find_checkpoint
from pretrain.run.journal import read, series
from tests.runs import ROOT

COMPARED = ("loss/total", "loss/train", "loss/val", "optim/grad_norm")
"""Metrics of the journal, of every step that has them."""
MOST_TOLD = 10


def checked_out(revision: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{revision}: git has no such commit here: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def duet_of(tree: Path, *args: str) -> None:
    """Run the command line of another version, with this interpreter. Raises SystemExit if it fails."""
    # Before the installed one, in the ranks too.
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    asked = "import launch, model, pretrain, data_pipeline, sys\n"
    asked += "assert all(m.__file__.startswith(sys.argv[1]) for m in (launch, model, pretrain, data_pipeline))"
    for command in (["-c", asked, f"{tree}/"], ["-m", "launch.cli", *args]):
        done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: {' '.join(command[:8])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def differences(old: Path, new: Path) -> list[str]:
    """Where the journals and the newest checkpoints of two run folders do not agree with `==`; a line each."""
    one, other = (series(read(run / "metrics.jsonl")) for run in (old, new))
    found = []
    for name in COMPARED:
        ours, theirs = ({point.step: point.value for point in told.get(name, [])} for told in (one, other))
        assert ours, f"{old}: the journal has no {name}"
        steps = sorted(step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step))
        if steps:
            first = steps[0]
            found.append(f"{name}: {len(steps)} steps differ, first {first}: {ours.get(first)} | {theirs.get(first)}")
    a, b = (find_checkpoint(run)[0] for run in (old, new))
    if a.manifest.step != b.manifest.step:
        found.append(f"the newest checkpoint is of step {a.manifest.step} | {b.manifest.step}")
    found += [f"{name}: {left} | {right}" for name, (left, right) in shape_differences(a, b).items()]
    for state in tensor_differences(a, b):
        if state.largest != 0:
            found.append(f"{state.name} {state.state}: by up to {state.largest:.3g}")
    return found


def compare(revision: str, presets: Sequence[str], options: dict[str, list[str]], sources: dict[str, str]) -> bool:
    """Train each preset at a commit and as the files are now, one after the other; say what differs. True if nothing.

    Args:
        options: what a run of each preset is told.
        sources: the preset of data for each; the older version makes the datasets, which both read.
    """
    equal = True
    with tempfile.TemporaryDirectory(prefix="duet-versions-") as name:
        folder = Path(name)
        older = checked_out(revision, folder / "older")
        for number, preset in enumerate(presets):
            source = sources[preset]
            data = folder / source.replace("/", "-")
            if not data.exists():
                text = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
                duet_of(older, "data", "build", source, text, f"data.path={data}")
            runs = folder / f"old-{number}", folder / f"new-{number}"
            for tree, run in zip((older, ROOT), runs, strict=True):
                duet_of(tree, "train", preset, f"data.path={data}", f"run.dir={run}", *options[preset])
            told = differences(*runs)
            equal = equal and not told
            print(f"{preset}: {'equal, bit for bit' if not told else f'{len(told)} differences'}", flush=True)
            for line in told[:MOST_TOLD]:
                print(f"  {line}", flush=True)
    return equal
