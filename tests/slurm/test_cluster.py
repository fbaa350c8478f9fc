"""The cluster that the tests stand on is what they take it for."""

import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.processes import alive, daemons, tasks


def submit(cluster: Cluster, folder: Path, body: str, *options: str) -> str:
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    return cluster.run("sbatch", "--parsable", f"--output={folder}/out", *options, str(script)).split(";")[0].strip()


def test_a_job_runs_on_the_nodes_it_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        cluster, tmp_path, "srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'", "-N2", "--gpus-per-node=2"
    )
    assert cluster.wait_for_job(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert sorted((tmp_path / "out").read_text().split()) == ["0,1", "0,1", "n1", "n2"]


@pytest.mark.drill
def test_a_killed_node_requeues_its_job_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        cluster, tmp_path, "echo started >> log; while [ ! -e go ]; do sleep 0.1; done", "-N2", f"--chdir={tmp_path}"
    )
    cluster.wait_for_job(job, "RUNNING")
    before = tasks(cluster.name)
    cluster.kill_node("n1")
    cluster.wait_for_job(job, "PENDING")
    assert not any(map(alive, before))
    (tmp_path / "go").touch()
    cluster.start_nodes("n1")
    cluster.start_now(job)
    assert cluster.wait_for_job(job, "COMPLETED")["Restarts"] == "1"


def test_nothing_is_left_after_down(tmp_path: Path, slurm: Cluster) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = Cluster(Path(folder), nodes=1)
        try:
            other.up()
            submit(other, tmp_path, "sleep 600")
            assert other.run("squeue", "-h")
        finally:
            other.down()
        assert not daemons(other.folder)
    assert not tasks(other.name)
    assert daemons(slurm.folder), "a cluster ended another's processes"
