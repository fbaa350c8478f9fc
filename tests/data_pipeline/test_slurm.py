"""The batch script: what it submits, and what its jobs do. The scheduler is a stand-in that runs jobs as they come."""

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.manifest import Manifest
from tests.data_pipeline.conftest import REPOSITORY, config, contents, prose

SCRIPT = REPOSITORY / "slurm" / "tokenize.sbatch"
SBATCH = """#!/bin/bash
# Runs a job at once: each element of its array, as Slurm would set its environment; prints the job's number.
echo "$*" >> "$CALLS"
for word in "$@"; do
    case $word in --array=*) elements=$(seq ${word#--array=0-} -1 0) ;; esac
done
while [[ $1 == --* ]]; do shift; done
number=$(wc -l < "$CALLS")
for element in ${elements:-none}; do
    [ "$element" = "$SKIPPED" ] && continue
    SLURM_JOB_ID=$number SLURM_ARRAY_TASK_ID=$element bash "$@" >> "$CALLS.out" 2>&1 < /dev/null
done
echo "$number;cluster"
"""


def submit(folder: Path, *arguments: str, skipped: str = "") -> str:
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ
        | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "DUET_PYTHON": sys.executable,
            "DUET_SBATCH": "--partition=cpu",
            "PYTHONPATH": str(REPOSITORY),
            "SKIPPED": skipped,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_three_jobs_build_the_dataset(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(prose(800, number))
    settings = config(tmp_path / "reference", tmp_path / "text", tokenizer={"type": "char"})
    wanted = build(settings).fingerprint
    overrides = [
        f"data.sources.text.paths=[{tmp_path / 'text'}]",
        f"data.path={tmp_path / 'd'}",
        "data.tokenizer.type=char",
        "data.split.rule=tail",
        "data.split.fraction=0.1",
    ]
    assert submit(tmp_path, "2", *overrides, skipped="0") == "prepare 1, tasks 2, merge 3\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split(str(SCRIPT))[0] for call in calls] == [
        "--parsable --kill-on-invalid-dep=yes --partition=cpu ",
        "--parsable --kill-on-invalid-dep=yes --partition=cpu --array=0-1 --dependency=afterok:1 ",
        "--parsable --kill-on-invalid-dep=yes --partition=cpu --dependency=afterany:2 ",
    ]
    said = (tmp_path / "calls.out").read_text()
    assert "1 of 1 units are not tokenized yet: 0" in said
    assert not (tmp_path / "d" / "manifest.json").exists()
    environment = os.environ | {"DUET_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_ID": "9"}
    for step in ("task", "merge"):
        command = ["bash", str(SCRIPT), step, "2", *overrides]
        subprocess.run(command, env=environment | {"SLURM_ARRAY_TASK_ID": "0"}, check=True, capture_output=True)
    assert Manifest.load(tmp_path / "d").fingerprint == wanted
    assert contents(tmp_path / "d" / "train") == contents(tmp_path / "reference" / "train")
