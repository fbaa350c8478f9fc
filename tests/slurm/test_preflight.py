"""`launch.commands.preflight` on a real Slurm, as the batch script starts it."""

import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.storage.manifest import Manifest
from launch.commands.preflight import AVOID, GOOD
from launch.slurm.exclude import avoided
from pretrain.run.job_records import JobFolder
from tests.ports import free_port
from tests.runs import ROOT, SMALL
from tests.slurm.cluster import Cluster

# The data of one node are another copy than the others'.
ON_EACH_NODE = '[ "$SLURMD_NODENAME" != n2 ] || export DUET_DATA="$0"; exec "$@"'


def preflight(cluster: Cluster, run_dir: Path, data: Path, of_n2: Path, *options: str) -> tuple[int, str]:
    port = free_port()
    rank = [sys.executable, "-P", "-m", "launch.commands.preflight", str(run_dir), *SMALL]
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=150", *options]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "bash", "-c", ON_EACH_NODE, str(of_n2), *rank, f"data.path={data}", f"run.dir={run_dir}"],
        env=cluster.environment | where,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_bad_node_is_named_and_the_next_start_avoids_it(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / Manifest.load(copy).shards_of("train")[0].path
    shard.write_bytes(b"\0" * shard.stat().st_size)
    run_dir = tmp_path / "run"
    code, said = preflight(cluster, run_dir, dataset, copy, "--nodelist=n1,n2")
    assert code == AVOID, said
    assert f"bad node n2: shard {shard}" in said
    folder = JobFolder(run_dir)
    assert avoided(folder) == ["n2"]
    [failure] = folder.rank_failures(folder.excluded()[0]["job"], 0)
    assert "bad node n2" in failure.what
    code, said = preflight(cluster, run_dir, dataset, copy, f"--exclude={','.join(avoided(folder))}")
    assert code == GOOD, said
    assert "preflight of 2 node(s), 2 rank(s)" in said
    assert "links between nodes" in said
