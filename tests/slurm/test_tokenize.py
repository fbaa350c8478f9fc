"""slurm/tokenize.sbatch: three jobs, the failure of one task, and its repair."""

import subprocess
import sys
from pathlib import Path

from data_pipeline.building.api import build
from data_pipeline.storage.manifest import Manifest
from tests.data_pipeline.conftest import config, contents, prose
from tests.runs import ROOT
from tests.slurm.cluster import Cluster

SCRIPT = str(ROOT / "slurm" / "tokenize.sbatch")


def run(cluster: Cluster, folder: Path, *command: str) -> str:
    """On the login node; what it printed. Task 1 is killed when it begins for the first time."""
    setup, killed = folder / "setup.sh", folder / "killed"
    once = f'[ "${{SLURM_ARRAY_TASK_ID:-}}" != 1 ] || [ -e {killed} ] || {{ touch {killed}; kill -KILL $$; }}\n'
    setup.write_text(f"{once}export PATH={Path(sys.executable).parent}:$PATH\n")
    site = {"DUET_SETUP": str(setup), "DUET_CODE": str(ROOT), "DUET_SBATCH": "--cpus-per-task=1"}
    done = subprocess.run(
        command, env=cluster.environment | site, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_no_step_and_no_number_is_named(cluster: Cluster, tmp_path: Path) -> None:
    for words, told in {
        ("many",): "many: not a number of tasks, nor prepare, task or merge",
        ("task", "2"): "task is the work of a job: sbatch",
        (): "how many tasks?",
    }.items():
        done = subprocess.run(
            ["bash", SCRIPT, *words], env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode
        assert told in done.stderr
    assert not cluster.run("squeue", "-h")


def test_a_task_that_was_killed_is_named_and_done_again(cluster: Cluster, tmp_path: Path) -> None:
    sources = {}
    for number in range(3):
        file = tmp_path / f"{number}.txt"
        file.write_text(prose(300, number))
        sources[f"s{number}"] = {"paths": [str(file)]}
    character: dict[str, object] = {"type": "char"}
    wanted = build(config(tmp_path / "reference", sources=sources, tokenizer=character)).fingerprint
    settings = [f"data.sources.{name}.paths={source['paths']}" for name, source in sources.items()]
    settings += [f"data.path={tmp_path / 'd'}", "data.tokenizer.type=char"]
    settings += ["data.split.rule=tail", "data.split.fraction=0.1"]

    # In the shell of another job, which has a size of its own.
    inside = ["env", "SLURM_JOB_ID=7", "SLURM_NNODES=3", "SLURM_MEM_PER_CPU=7", "SLURM_CPUS_PER_TASK=64"]
    said = run(cluster, tmp_path, *inside, "bash", SCRIPT, "2", *settings)
    prepare, array, merge = (words.split()[1] for words in said.split(", "))
    assert said == f"prepare {prepare}, tasks {array}, merge {merge}"
    assert cluster.wait_for_job(merge, "COMPLETED", "FAILED")["ExitCode"] == "2:0"
    log = (tmp_path / f"duet-data-{merge}.out").read_text()
    assert "1 of 3 units are not tokenized yet: 1. Unit U is the work of task U modulo the number of tasks" in log
    assert "Traceback" not in log
    assert not (tmp_path / "d" / "manifest.json").exists()

    options = ("--parsable", "--cpus-per-task=1")
    again = run(cluster, tmp_path, "sbatch", *options, "--array=1", SCRIPT, "task", "2", *settings)
    merge = run(cluster, tmp_path, "sbatch", *options, f"--dependency=afterok:{again}", SCRIPT, "merge", "2", *settings)
    assert cluster.wait_for_job(merge, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED"
    assert Manifest.load(tmp_path / "d").fingerprint == wanted
    assert contents(tmp_path / "d" / "train") == contents(tmp_path / "reference" / "train")
