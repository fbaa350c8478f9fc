"""No command is silent on a terminal for two seconds, or breaks a word there (`make drills`, some minutes)."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from pretrain.status_line import fit
from tests.runs import ROOT
from tests.terminal import COLUMNS, on_terminal
from tests.test_docs import commands, scripts

pytestmark = pytest.mark.drill
MOST_SECONDS = 2.0
WITHOUT_SLURM = [
    "duet cancel runs/first",
    "duet requeue runs/first",
    "duet resume runs/first",
    "duet checkpoint shrink runs/first --gates --to smaller",
    "duet data upload data/mine s3://bucket/mine",
    "duet quickstart --dir quick",
]
"""Not run by the documents' test; most end with an error here."""


def test_every_command_says_something_every_two_seconds(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    shutil.copy(ROOT / "LICENSE", tmp_path)
    run = [script for name in ("README.md", "docs/commands.md") for script in scripts(ROOT / name)] + WITHOUT_SLURM
    assert [name for name in commands() if not any(f"duet {name}" in script for script in run)] == []
    silent, failed, broken = {}, {}, {}
    for script in run:
        seen = on_terminal(["bash", "-eo", "pipefail", "-c", script], tmp_path, environment)
        print(f"{seen.silence:5.2f} s  {seen.code}  {script.splitlines()[0]}")
        if seen.silence > MOST_SECONDS:
            silent[script] = seen.silence
        if seen.code not in ((0, 2) if script in WITHOUT_SLURM else (0,)):
            failed[script] = seen.text
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.text))
        if long := [line for line in lines if "duet " in script and fit(line, COLUMNS) != line]:
            broken[script] = long
    assert (silent, failed, broken) == ({}, {}, {})


def test_a_silence_is_noticed(tmp_path: Path) -> None:
    assert on_terminal(["sleep", "2.1"], tmp_path, os.environ).silence > MOST_SECONDS
