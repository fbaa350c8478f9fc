"""docs/slurm.md does what it says, on a real Slurm with the real trainer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.site import Cluster as Site
from pretrain.run.job_records import JobFolder
from pretrain.run.journal import read
from pretrain.run.run_folder import RunFolder
from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until
from tests.test_docs import FENCE

ENDED = ("COMPLETED", "FAILED", "CANCELLED")
TEXT = (ROOT / "docs" / "slurm.md").read_text()


def test_every_key_of_a_site_is_told() -> None:
    [table] = re.findall(r"(?ms)^## A site$.*?^\| key \|.*?\n\n", TEXT)
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == sorted(
        Site.model_fields, key=lambda name: table.index(f"`{name}`")
    )


def test_the_tutorial_says_nothing_else() -> None:
    lines = [
        {line for kind, script in FENCE.findall(text) if kind == "bash slurm" for line in script.splitlines()}
        for text in ((ROOT / "docs" / "tutorial.md").read_text(), TEXT)
    ]
    assert lines[0] and lines[0] <= lines[1]


def starts(run: Path) -> list[tuple[str, str]]:
    """Job and restart of each start that has taken a step."""
    found: list[tuple[str, str]] = []
    tags: dict[str, str] = {}
    for record in read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else ():
        if record.kind == "start":
            tags = record.fields["tags"]
        elif record.kind == "metrics" and tags:
            found.append((tags["slurm/job_id"], tags.get("slurm/restarts", "0")))
            tags = {}
    return found


@pytest.mark.drill
def test_from_an_empty_account_to_a_resumed_run(cluster: Cluster, tmp_path: Path) -> None:
    """Block by block as it is written; a job that was started meanwhile is given the time to take a step."""
    for name in ("LICENSE", "slurm"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    environment = cluster.environment | {
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DUET_PYTHON": sys.executable,
    }
    run = tmp_path / "runs" / "first"
    jobs = JobFolder(run)
    said = ""

    def job() -> dict[str, str]:
        return cluster.job(jobs.submissions()[-1]["job"])

    def settled() -> bool:
        """No job is there, or it has taken a step in its present start."""
        if not jobs.submissions() or job()["JobState"] in ENDED:
            return True
        return job()["JobState"] == "RUNNING" and starts(run)[-1:] == [(job()["JobId"], job()["Restarts"])]

    for kind, script in FENCE.findall(TEXT):
        if kind != "bash slurm":
            continue
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        said += done.stdout
        assert done.returncode == 0, f"exit code {done.returncode}:\n{said}"
        if "duet requeue" in script:
            wait_until(lambda: (job()["JobState"], job()["Restarts"]) == ("PENDING", "1"), 60, "the requeue")
            cluster.start_now(job()["JobId"])
        if "duet cancel" in script:
            wait_until(lambda: job()["JobState"] in ENDED, 60, "the end")
        wait_until(settled, 90, f"a step after:\n{script}\n{said}")
    first, second = (record["job"] for record in jobs.submissions())
    assert starts(run) == [(first, "0"), (first, "1"), (second, "0")]
    resumed = [record.fields["resumed_from"] for record in read(run / "metrics.jsonl") if record.kind == "start"]
    assert resumed[0] is None
    assert 0 < resumed[1] < resumed[2]
    assert RunFolder(run).facts()["world_size"] == 2
    assert "bits_per_byte" in (next(tmp_path.glob("duet-eval-*.out"))).read_text()
    assert (run / "report.html").is_file()
