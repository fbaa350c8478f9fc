"""What a user sees and does from a login node: status, logs, cancel, requeue, resume, on a real Slurm."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import RunError
from launch.cli import app
from launch.commands.jobs import _log
from launch.slurm.run_status import status as status_of
from pretrain.config.schema import dump, load
from pretrain.run.job_records import JobFolder
from tests.runs import CHARACTERS, ROOT, SMALL
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until

PYTHON = """#!/bin/bash
[ "$3" != pretrain ] || exec {python} -m tests.slurm.recorded
exec {python} "$@"
"""
SETTINGS = ["model.context=16", "batch.tokens=1000000", "train.steps=100000"]


pytestmark = pytest.mark.usefixtures("commands")


def duet(*words: str) -> str:
    """In this process; its output."""
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.output)


def asked(run: str = "run") -> dict[str, Any]:
    content = json.loads(duet("status", run, "--json"))
    assert content["slurm"] == "asked"
    [status] = content["runs"]
    return dict(status)


def wait_for(run: str, *states: str, **values: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [asked(run)]
        return found[0]["state"] in states and all(found[0][name] == value for name, value in values.items())

    try:
        wait_until(there, 60, f"{run} {states} {values}")
    except TimeoutError:
        raise AssertionError(found) from None
    return found[0]


def submit(cluster: Cluster, run: Path, *options: str) -> str:
    """slurm/pretrain.sbatch as `duet submit` leaves it: with its record, and the configuration beside it."""
    folder, here = JobFolder(run), run.parent
    folder.path.mkdir(parents=True)
    folder.config.write_text(dump(load([*SETTINGS, f"run.dir={run}", f"data.path={here}"])))
    python = here / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    settings = {"DUET_PYTHON": python, "DUET_CODE": ROOT, "DUET_CACHE": here / "cache"}
    log = f"--output={run}/slurm/job-%j.log"
    folder.script.write_text((ROOT / "slurm" / "pretrain.sbatch").read_text().replace("--output=%x-%j.out", log))
    command = ["sbatch", "--parsable", "--ntasks-per-node=1", "--gpus-per-node=0", *options, str(folder.script)]
    done = subprocess.run(
        [*command, str(folder.config)],
        env=cluster.environment | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    folder.submitted(done.stdout.strip(), "test", "2", command)
    return done.stdout.strip()


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[[], "tuple[subprocess.Popen[bytes], Path]"]]:
    """Starts `duet logs -f` on a run whose job waits; the process, and what it shows."""
    out = tmp_path / "followed"
    started = []
    program = "from launch import cli\nfrom launch.commands import jobs\njobs.STATUS_SECONDS = 0.5\ncli.main()"

    def start() -> "tuple[subprocess.Popen[bytes], Path]":
        with open(out, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", program, "logs", str(tmp_path / "run"), "-f"],
                cwd=ROOT,
                stdout=file,
                stderr=file,
            )
        started.append(process)
        wait_until(lambda: "waiting for" in out.read_text(), 60, "duet logs -f")
        return process, out

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_life_of_a_run_as_its_user_sees_it(
    cluster: Cluster, tmp_path: Path, follow: Callable[[], "tuple[subprocess.Popen[bytes], Path]"]
) -> None:
    job = submit(cluster, tmp_path / "run", "--nodes=2", "--time=60", "--hold")
    status = asked()
    assert (status["state"], status["job"], status["total"], status["step"]) == ("queued", job, 100000, None)
    assert "scontrol release" in status["why"]
    with pytest.raises(RunError, match=f"job {job} waits in the queue already"):
        duet("requeue", "run")
    with pytest.raises(RunError, match=f"job {job} is still there"):
        duet("resume", "run")
    with pytest.raises(RunError, match="no log yet .queued"):
        duet("logs", "run")
    process, out = follow()
    cluster.run("scontrol", "release", job)
    status = wait_for("run", "running")
    assert status["nodes"] == "n[1-2]" and status["node_count"] == 2 and status["restarts"] == 0
    wait_until(lambda: asked()["checkpoint"], 30, "a checkpoint")
    status = asked()
    assert status["loss"] == 5.0 and status["tokens_per_second"] == 1000.0 and status["step"] > 0
    left = (status["total"] - status["step"]) * 1000  # a million tokens a step
    assert abs(status["run_ends"] - time.time() - left) < 60_000
    assert 0 < status["time_left"] <= 3600
    text = duet("status", "run")
    for words in ("state       running", f"job         {job} (RUNNING)", "n[1-2] (2)", "/100000 (0%)", "at this speed"):
        assert words in text, text
    assert "running" in duet("status", ".").splitlines()[1]

    assert "saves at the end of its step and goes back" in duet("requeue", "run")
    requeued = time.time()
    status = wait_for("run", "requeued")
    assert "BeginTime" in status["why"] and status["restarts"] == 1
    saved = status["checkpoint"]
    wait_until(lambda: time.time() > requeued + 1.5, 10, "the next second")
    cluster.start_now(job)
    status = wait_for("run", "running", restarts=1, attempts=2)
    assert status["step"] > saved and status["decision"]["action"] == "REQUEUE"

    assert f"duet cancel {tmp_path / 'run'} --now" in duet("cancel", str(tmp_path / "run"))
    status = wait_for("run", "stopped")
    assert status["job_state"] == "COMPLETED" and status["restarts"] == 1
    with pytest.raises(RunError, match="has ended already .COMPLETED.; `duet resume run`"):
        duet("cancel", "run")
    log = duet("logs", "run", "--lines", "1000")
    assert "trains from step 0\n" in log and f"trains from step {saved}\n" in log
    assert log.rstrip().endswith("remove it to go on")
    assert duet("logs", "run", "--lines", "1") == log.splitlines(keepends=True)[-1]
    assert duet("logs", "run", "--rank", "1") == "words of rank 1\n"
    with pytest.raises(RunError, match="ranks 0 to 1"):
        duet("logs", "run", "--rank", "7")
    assert process.wait(30) == 0, "-f ends with the run"
    shown = out.read_text()
    assert "waiting for" in shown and log in shown and "run: stopped" in shown.splitlines()[-1]


def test_cancel_now_and_a_run_that_hangs(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "--nodes=1")
    config = JobFolder(tmp_path / "run").config
    config.write_text(dump(load([str(config), "health.hang_minutes=0.005"])))
    wait_for("run", "running")
    (tmp_path / "run" / "still").touch()
    status = wait_for("run", "stalled")
    assert "no step since" in status["why"]
    with pytest.raises(RunError, match="would not save now"):
        duet("requeue", "run")
    assert f"job {job} is told to end at once" in duet("cancel", "run", "--now")
    assert wait_for("run", "cancelled")["job_state"] == "CANCELLED"
    assert not JobFolder(tmp_path / "run").kill_switch.exists()


def test_runs_of_an_array_and_ones_that_failed(cluster: Cluster, tmp_path: Path) -> None:
    Path("array.sh").write_text("#!/bin/bash\n[ $SLURM_ARRAY_TASK_ID = 1 ] && exit 3\nsleep 600\n")
    job = cluster.run("sbatch", "--parsable", "--array=1-3%2", "-o", "%A-%a.log", "--time=30", "array.sh").strip()
    for element in "123":
        JobFolder(tmp_path / "runs" / element).submitted(f"{job}_{element}", "test", "1", [], f"{element} of 1-3")
    assert "exit code 3" in wait_for("runs/1", "failed")["why"]
    wait_for("runs/2", "starting")
    lines = {line.split()[0]: line.split() for line in duet("status", "runs").splitlines()[1:]}
    assert [lines[f"runs/{element}"][2] for element in "123"] == [f"{job}_{element}" for element in "123"]
    assert duet("cancel", "runs/3", "--now")
    assert wait_for("runs/3", "cancelled")
    assert asked("runs/2")["state"] == "starting", "the other elements go on"


def test_resume_submits_again_on_other_nodes(cluster: Cluster, dataset: Path) -> None:
    given = [CHARACTERS, "model/tiny", "run/quickstart", *SMALL, f"data.path={dataset}", "run.name=first"]
    duet("submit", *given, "--cluster", "local", "--sbatch=--hold", "--nodes", "2")
    status = asked("runs/first")
    assert (status["state"], status["node_count"]) == ("queued", 2)
    duet("cancel", "runs/first")
    JobFolder(Path("runs/first")).kill_switch.touch()  # as a job leaves it that was cancelled while it trained
    assert wait_for("runs/first", "cancelled")["job"] == status["job"]
    duet("resume", "runs/first", "--nodes", "4", "--time", "20")
    again = asked("runs/first")
    assert int(again["job"]) > int(status["job"]) and again["node_count"] == 4
    assert not JobFolder(Path("runs/first")).kill_switch.exists(), "else the job would end at once"
    with pytest.raises(RunError, match=f"job {again['job']} is still there"):
        duet("resume", "runs/first")
    assert f"slurm-{again['job']}.out" in str(_log(Path("runs/first"), status_of(Path("runs/first"))[0], None))
    duet("cancel", "runs/first", "--now")


def test_the_runs_of_a_sweep_are_found_and_have_logs(cluster: Cluster, dataset: Path) -> None:
    given = [CHARACTERS, "model/tiny", "run/quickstart", *SMALL, f"data.path={dataset}", "run.name=first"]
    duet("submit", *given, "--cluster", "local", "--sbatch=--hold", "--array", "run.seed=7,8")
    rows = [line.split() for line in duet("status", "runs").splitlines()[1:]]
    assert sorted(row[0] for row in rows) == ["runs/first/seed-7", "runs/first/seed-8"]
    for number, (name, job) in enumerate(sorted((row[0], row[2]) for row in rows)):
        assert job.endswith(f"_{number}")
        log = Path(name, "logs", f"slurm-{job}.out")
        log.write_text(f"words of {number}\n")
        assert duet("logs", name) == f"words of {number}\n"


def test_a_chain_and_a_job_that_slurm_forgot(cluster: Cluster, tmp_path: Path) -> None:
    Path("wait.sh").write_text("#!/bin/bash\nsleep 600\n")
    folder = JobFolder(tmp_path / "run")
    first = cluster.run("sbatch", "--parsable", "wait.sh").strip()
    second = cluster.run("sbatch", "--parsable", f"--dependency=afterany:{first}", "wait.sh").strip()
    for job in (first, second):
        folder.submitted(job, "test", "1", [])
    status = wait_for("run", "starting")
    assert (status["job"], status["more_jobs"]) == (first, [second])
    assert f"job {second} is removed" in duet("cancel", "run")
    JobFolder(tmp_path / "old").submitted("88888", "test", "1", [])
    status = asked("old")
    assert (status["state"], status["job"]) == ("dead", "88888")
    with pytest.raises(RunError, match="job 88888 has ended already"):
        duet("cancel", "old")


def test_no_controller_no_error(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    JobFolder(tmp_path / "run").submitted("1", "test", "1", [])
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    text = duet("status", "run")
    assert "submitted" in text and "from the run folders alone" in text and "no such file" in text
