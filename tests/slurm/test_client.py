"""launch/slurm/client.py on a real Slurm: what it asks, and what it makes of refusals."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm import client
from tests.ports import free_port
from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until

SLEEP = "#!/bin/bash\nwhile [ ! -e go ]; do sleep 0.1; done\nexit ${1:-0}\n"


@pytest.fixture(autouse=True)
def script(commands: None) -> None:
    """`job.sh` waits for the file `go`."""
    Path("job.sh").write_text(SLEEP)


def wait(job_id: str, *states: str) -> client.Job:
    def there() -> bool:
        job = client.job(job_id)
        return job is not None and job.state in states

    wait_until(there, 60, f"{job_id} {states}")
    job = client.job(job_id)
    assert job
    return job


def test_the_life_of_a_job(cluster: Cluster) -> None:
    said = client.test_only(Path("job.sh"), ["-N2"])
    assert said.startswith("to start at") and "n[1-2]" in said, said
    began = time.time()
    job_id = client.submit(Path("job.sh"), ["-N2", "--time=1-00:00:00", "--partition=high"], ["3"])
    job = wait(job_id, "RUNNING")
    assert (job.id, job.number, job.nodes, job.node_count, job.partition) == (job_id, job_id, "n[1-2]", 2, "high")
    assert client.hostnames(job.nodes) == ["n1", "n2"]
    assert job.restarts == 0 and not job.reason and not job.ended and not job.waiting
    assert job.start and job.end and job.time_left and job.submitted
    assert began - 2 < job.submitted <= job.start < began + 120
    assert job.end - job.start == 24 * 3600
    assert 23.5 * 3600 < job.time_left <= 24 * 3600
    client.requeue(job_id)
    again = time.time() + 1.5
    assert wait(job_id, "PENDING").waiting
    wait_until(lambda: time.time() > again, 10, "the next second: within this one Slurm takes it for the old start")
    client.update(job_id, starttime="now")
    assert wait(job_id, "RUNNING").restarts == 1
    Path("go").touch()
    job = wait(job_id, "FAILED", "COMPLETED")
    assert (job.state, job.exit_code, job.reason, job.ended) == ("FAILED", 3, "NonZeroExitCode", True)


def test_a_waiting_job_says_why_and_when(cluster: Cluster) -> None:
    first = client.submit(Path("job.sh"), ["-N4", "--exclusive", "--time=60"])
    wait(first, "RUNNING")
    second = client.submit(Path("job.sh"), ["-N4", "--exclusive"])
    wait_until(lambda: (job := client.job(second)) is not None and job.start, 60, "an estimate of the start")
    one, other = client.job(first), client.job(second)
    assert one and other and other.reason in ("Resources", "Priority")
    assert other.start == one.end
    client.cancel(second)
    assert wait(second, "CANCELLED").ended


def test_elements_of_an_array(cluster: Cluster) -> None:
    array = client.submit(Path("job.sh"), ["--array=1-3%1"])
    wait(f"{array}_1", "RUNNING")
    known = client.jobs([array, "77777"])
    assert {job.id: job.state for job in known.values()} == {
        f"{array}_1": "RUNNING",
        f"{array}_2": "PENDING",
        f"{array}_3": "PENDING",
    }
    number = known[f"{array}_1"].number
    assert number != array, "what SLURM_JOB_ID is inside of the element"
    assert client.jobs([number])[number].id == f"{array}_1"


def test_a_signal_reaches_the_batch_script(cluster: Cluster) -> None:
    Path("trap.sh").write_text("#!/bin/bash\ntrap 'exit 7' USR1\ntouch ready\nwhile :; do sleep 0.1; done\n")
    job_id = client.submit(Path("trap.sh"))
    wait_until(Path("ready").exists, 60, "the trap")
    client.signal(job_id, "USR1")
    assert wait(job_id, "FAILED").exit_code == 7


def test_the_surroundings_do_not_change_what_is_read(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = client.submit(Path("job.sh"))
    wait(job_id, "RUNNING")
    for name, value in (("SLURM_TIME_FORMAT", "relative"), ("SQUEUE_STATES", "PD"), ("SQUEUE_FORMAT", "%i")):
        monkeypatch.setenv(name, value)
    job = client.job(job_id)
    assert job and job.start and job.state == "RUNNING"


@pytest.mark.parametrize(
    ("options", "said", "advice"),
    [
        (["--partition=nosuch"], "nosuch; Batch job submission failed: Invalid partition", "choose one of high, main"),
        (["--nodes=9"], "Node count specification invalid", "more than the partition has"),
        (["--ntasks=999"], "More processors requested than permitted", "sinfo -o"),
        (["--gpus-per-node=8"], "Requested node configuration is not available", "GPUs"),
        (["--time=abc"], "Invalid --time specification", "HOURS:MINUTES:SECONDS"),
        (["--time=9-0"], "Requested time limit is invalid", "less time"),
        (["--gres=foo:1"], "Invalid generic resource", "%G"),
        (["--nodelist=n77"], "Invalid node name specified", "sinfo -N"),
        (["--constraint=x"], "Invalid feature specification", "%f"),
        (["--reservation=x"], "Requested reservation is invalid", "scontrol show reservation"),
        (["--dependency=bogus:1"], "Job dependency problem", "afterok:JOB"),
        (["--array=1-0"], "Invalid job array specification", "0-7%2"),
        (["--signal=FOO@60"], "Invalid --signal specification", "B:USR1@SECONDS"),
        (["--nosuchflag"], "unrecognized option '--nosuchflag'", "sbatch --help"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_refusal_says_what_to_change(cluster: Cluster, options: list[str], said: str, advice: str) -> None:
    for ask in (client.submit, client.test_only):
        with pytest.raises(client.SlurmError) as refused:
            ask(Path("job.sh"), options)
        text = str(refused.value)
        assert said.rpartition("; ")[2].rpartition(": ")[2] in text and advice in text and "\n" not in text
    assert not cluster.run("squeue", "-h")


@pytest.mark.parametrize(
    ("text", "advice"),
    [("hello\n", "#!/bin/bash"), ("#!/bin/bash\r\nls\r\n", "Unix line ends"), (None, "missing")],
    ids=["no shebang", "DOS line ends", "no file"],
)
def test_a_script_that_is_none(text: str | None, advice: str) -> None:
    script = Path("odd.sh")
    if text:
        script.write_bytes(text.encode())
    with pytest.raises(client.SlurmError, match=advice):
        client.submit(script)


def test_what_slurm_only_warns_of_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.submit(Path("job.sh"), ["-N2", "-n1"]).isdigit()
    assert "can't run 1 processes on 2 nodes" in capsys.readouterr().err


def test_jobs_that_are_not_there(cluster: Cluster) -> None:
    assert client.job("77777") is None
    assert client.jobs([]) == {}
    for call in (lambda: client.requeue("77777"), lambda: client.signal("77777", "USR1")):
        with pytest.raises(client.SlurmError, match="does not know the job, or no longer"):
            call()
    job_id = client.submit(Path("job.sh"), ["--hold", "--no-requeue"])
    with pytest.raises(client.SlurmError, match="--no-requeue"):
        client.requeue(job_id)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user")
def test_a_job_of_another_user(cluster: Cluster) -> None:
    job_id = client.submit(Path("job.sh"), ["--hold"])
    program = (
        "import os, sys\nfrom launch.slurm import client as slurm\nos.setuid(65534)\n"
        f"try:\n    slurm.cancel('{job_id}')\nexcept slurm.SlurmError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "another user's" in done.stdout, done.stderr


def test_a_controller_that_is_not_there(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """First the port is closed; then somebody listens who never answers."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(client.SlurmError, match="SLURM_CONF=.*no such file"):
        client.jobs(["1"])
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        lines = (cluster.folder / "slurm.conf").read_text().splitlines()
        replaced = {"SlurmctldPort": f"{port}", "MessageTimeout": "2"}
        kept = [line for line in lines if line.split("=")[0] not in replaced]
        ours = "\n".join([*kept, *(f"{name}={value}" for name, value in replaced.items())]) + "\n"
        (tmp_path / "slurm.conf").write_text(ours)
        monkeypatch.setattr(client, "SECONDS", 0.5)
        with pytest.raises(client.SlurmError, match=r"squeue: no answer in .* s"):
            client.jobs(["1"])
        with pytest.raises(client.SlurmError, match=r"look with `squeue --me` before you submit again"):
            client.submit(Path("job.sh"))
    monkeypatch.setattr(client, "SECONDS", 30)
    with pytest.raises(client.SlurmError, match="running jobs go on"):
        client.jobs(["1"])


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not client.available()
    with pytest.raises(client.SlurmError, match="squeue: no such program here"):
        client.jobs(["1"])
