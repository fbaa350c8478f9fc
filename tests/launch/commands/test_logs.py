"""Where the output of a real run goes: rank 0's own words to the screen, everything into the run folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import SMALL, duet


def test_the_log_of_rank_0_is_a_plain_copy_of_the_screen(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*SMALL, f"data.path={dataset}", f"run.dir={run_dir}", "train.steps=4"]
    done = duet("train", *arguments, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    logs = run_dir / "logs"
    assert sorted(path.name for path in logs.glob("rank-*")) == ["rank-0.log", "rank-1.log"]
    log = (logs / "rank-0.log").read_text()
    assert "step 4 of 4" in done.stdout
    assert [line for line in done.stdout.splitlines() if line not in log.splitlines()] == []
    refused = duet("train", *arguments, "optimizer.lr=0.5")
    assert refused.returncode == 2
    assert refused.stderr.strip() in (logs / "rank-0.log").read_text()


@pytest.mark.drill
def test_ranks_that_srun_starts_have_their_logs_and_only_rank_0_the_screen(dataset: Path, tmp_path: Path) -> None:
    """Two processes with srun's variables; nobody redirects them."""
    run_dir = tmp_path / "run"
    common = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "LOCAL"))}
    common |= {"OMP_NUM_THREADS": "1", "SLURM_NTASKS": "2", "DUET_RENDEZVOUS": f"file://{tmp_path}/store"}
    arguments = [*SMALL, f"data.path={dataset}", f"run.dir={run_dir}", "train.steps=2"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "pretrain", *arguments],
            env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "step 2 of 2" in outputs[0]
    assert outputs[1] == ""
    assert (run_dir / "logs" / "rank-1.log").exists()
