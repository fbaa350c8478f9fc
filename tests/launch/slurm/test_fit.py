"""Nodes that can share the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from launch.slurm import fit
from launch.slurm.fit import nodes_that_fit
from pretrain.config.schema import load
from tests.runs import ROOT


@given(st.integers(1, 16), st.integers(1, 8), st.sampled_from([1, 2, 3, 6, 8, 12, 24, 48, 96, 360]))
def test_the_most_nodes_that_divide_the_batch(granted: int, tasks: int, sequences: int) -> None:
    config = load(["model.context=16", f"batch.tokens={16 * sequences}"])
    possible = [nodes for nodes in range(1, granted + 1) if sequences % (nodes * tasks) == 0]
    if possible:
        assert nodes_that_fit(config, granted, tasks) == max(possible)
    else:
        with pytest.raises(ConfigError, match=f"no number of nodes up to {granted}, with {tasks} rank"):
            nodes_that_fit(config, granted, tasks)


def test_what_the_batch_script_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model.context=16", "batch.tokens=64", f"run.dir={tmp_path}/a run", "data.path=data", "--nodes=3"]
    assert fit.main([*given, "--tasks=1"]) == 0
    assert capsys.readouterr().out == f"2\n{tmp_path}/a run\n{Path.cwd()}/data\n"
    assert fit.main([*given[:3], "data.path=s3://bucket/data", "--nodes=1", "--tasks=1"]) == 0
    assert capsys.readouterr().out == f"1\n{tmp_path}/a run\n\n", "nothing to copy to a node's disk"
    assert fit.main([*given, "--tasks=5"]) == 2
    assert "error: no number of nodes" in capsys.readouterr().err


def test_other_code_than_that_of_the_job_is_refused(tmp_path: Path) -> None:
    """Ranks, batch script and the command line of a job alike."""
    for module in ("pretrain", "launch.slurm.fit", "launch.cli"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, "--nodes=1", "--tasks=1"],
            env=os.environ | {"DUET_ONLY_CODE": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: the code of this job is {tmp_path}, but that in {ROOT} runs")


def test_neither_needs_torch() -> None:
    for module in ("launch.slurm.fit", "launch.slurm.policy"):
        program = "import sys\nfor name in ('torch', 'pyarrow', 'mlflow', 'deepspeed'): sys.modules[name] = None\n"
        subprocess.run([sys.executable, "-c", f"{program}import {module}"], cwd=ROOT, check=True)
