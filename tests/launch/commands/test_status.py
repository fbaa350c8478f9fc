"""`duet status` without Slurm: what is made of a folder and a job, in every combination that matters."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal, write_sealed
from launch.commands.jobs import _from_script, _Tail
from launch.commands.status import _block
from launch.completion import complete_runs
from launch.slurm import client
from launch.slurm.render import directive
from launch.slurm.run_files import read_files
from launch.slurm.run_status import join, statuses
from pretrain.run.job_records import Failure, Heartbeat, JobFolder
from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.run.run_listing import list_runs
from tests.runs import ROOT, duet
from tests.slurm.processes import wait_until

NOW = time.time()
JOB = client.Job("7", "7", "RUNNING", 2, "n[1-2]", "main", "me", NOW - 900, NOW - 600, None, None, 0, 0, "")
"""It has run for ten minutes."""
QUEUED = replace(JOB, state="PENDING", nodes="", start=NOW + 3600, reason="Resources")


@contextlib.contextmanager
def training(run: Path, job: str | None = "7", *, age: float = 0.0, began: float = NOW - 300) -> Iterator[None]:
    """A run whose owner lives; its last step is `age` seconds old."""
    os.environ.pop("SLURM_JOB_ID", None)
    if job:
        os.environ["SLURM_JOB_ID"] = job
    with Lease.acquire(run) as lease:
        file = run / "attempts" / f"{lease.attempt:06d}.json"
        write_sealed(file, unseal(file.read_bytes()) | {"started": began})
        journal = Journal(run / "metrics.jsonl", lease.attempt)
        journal.event("start", resumed_from=None)
        journal.metrics(4, {"loss/train": 2.0, "time/tokens_per_second": 100.0})
        beat = Heartbeat(5, lease.attempt, 2.0, 100.0, time=time.time() - age)
        (run / "heartbeat").write_text(json.dumps(vars(beat)))
        os.environ.pop("SLURM_JOB_ID", None)
        yield
        journal.close()


def ended(run: Path, status: str | None, job: str | None = "7", began: float = NOW - 300) -> None:
    """A run that said how it ended, or was killed before it could."""
    file = run / "attempts" / "000001.json"
    with training(run, job, began=began):
        record = unseal(file.read_bytes())
        if status:
            journal = Journal(run / "metrics.jsonl", 1)
            journal.event("end", status=status, reason="a reason")
    write_sealed(file, record | ({"ended": NOW} if status else {"pid_started": "0"}))


def state(run: Path, job: client.Job | None, *, asked: bool = True) -> str:
    return join(read_files(run), [job] if job else [], asked=asked).state


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (None, "dead"),
        (QUEUED, "queued"),
        (replace(QUEUED, state="CONFIGURING"), "starting"),
        (replace(QUEUED, restarts=1), "requeued"),
        (JOB, "starting"),
        (replace(JOB, state="FAILED"), "failed"),
        (replace(JOB, state="CANCELLED"), "cancelled"),
    ],
    ids=lambda value: value.state if isinstance(value, client.Job) else None,
)
def test_a_run_that_never_began(tmp_path: Path, job: client.Job | None, expected: str) -> None:
    JobFolder(tmp_path).submitted("7", "test", "2", [])
    assert state(tmp_path, job) == expected
    assert state(tmp_path, None, asked=False) == "submitted"


def test_a_run_that_trains(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{train: {steps: 20}, batch: {tokens: 1000}, engine: {timeout_minutes: 4}}")
    JobFolder(tmp_path).submitted("7", "test", "2", [])
    with training(tmp_path, age=60):
        assert state(tmp_path, JOB) == state(tmp_path, None, asked=False) == "running"
        status = join(read_files(tmp_path), [JOB], asked=True)
        assert (status.step, status.total, status.loss, status.tokens_per_second) == (5, 20, 2.0, 100.0)
        assert status.last_step and status.run_ends == status.last_step + 15 * 10
        assert state(tmp_path, replace(JOB, state="COMPLETING")) == "stopping"
        assert state(tmp_path, replace(JOB, state="SUSPENDED")) == "suspended"
        requeued = replace(JOB, start=NOW - 10, restarts=1)
        assert state(tmp_path, requeued) == "starting", "what is in the folder is of the start before"
        JobFolder(tmp_path).kill_switch.touch()
        assert state(tmp_path, JOB) == state(tmp_path, None) == "stopping"
        assert state(tmp_path, requeued) == "stopping"
        JobFolder(tmp_path).kill_switch.unlink()
    with training(tmp_path, age=121):
        assert state(tmp_path, JOB) == state(tmp_path, None) == "stalled"
        beat = JobFolder(tmp_path).last_heartbeat()
        assert beat
        for since, told in ((5, "validating"), (121, "stalled")):
            now = replace(beat, validating=time.time() - since, validated=0.25)
            (tmp_path / "heartbeat").write_text(json.dumps(vars(now)))
            assert state(tmp_path, JOB) == state(tmp_path, None) == told
    with training(tmp_path, None):
        assert state(tmp_path, QUEUED) == "running", "by hand, while a job waits"
    with training(tmp_path, began=JOB.start - 30 if JOB.start else 0):
        assert state(tmp_path, JOB) == "running", "the node's clock is behind the controller's"


@pytest.mark.parametrize(
    ("status", "job", "expected"),
    [
        ("KILLED", JOB, "stopping"),
        ("KILLED", replace(QUEUED, restarts=1), "requeued"),
        ("KILLED", QUEUED, "queued"),
        ("KILLED", replace(JOB, state="COMPLETED"), "stopped"),
        ("KILLED", replace(JOB, state="TIMEOUT"), "timed out"),
        ("KILLED", replace(JOB, state="PREEMPTED"), "preempted"),
        ("KILLED", replace(JOB, state="CANCELLED"), "cancelled"),
        ("KILLED", None, "stopped"),
        ("FINISHED", JOB, "finished"),
        ("FINISHED", replace(JOB, state="COMPLETED"), "finished"),
        ("FINISHED", replace(JOB, state="TIMEOUT"), "finished"),
        ("FINISHED", replace(JOB, number="8", id="8", state="FAILED", submitted=NOW - 9), "failed"),
        ("FINISHED", replace(JOB, number="6", id="6", state="FAILED"), "finished"),
        ("FINISHED", None, "finished"),
        ("FAILED", replace(JOB, state="FAILED"), "failed"),
        ("FAILED", None, "failed"),
        (None, replace(JOB, state="NODE_FAIL"), "failed"),
        (None, replace(JOB, state="OUT_OF_MEMORY"), "failed"),
        (None, replace(JOB, state="TIMEOUT"), "timed out"),
        (None, replace(JOB, state="COMPLETED"), "dead"),
        (None, JOB, "stopping"),
        (None, None, "dead"),
    ],
    ids=lambda value: value.state if isinstance(value, client.Job) else str(value),
)
def test_a_run_that_has_ended(tmp_path: Path, status: str | None, job: client.Job | None, expected: str) -> None:
    ended(tmp_path, status)
    assert state(tmp_path, job) == expected


def test_the_job_that_runs_comes_before_those_that_wait_and_those_that_ended(tmp_path: Path) -> None:
    words = ("TIMEOUT", "PREEMPTED", "RUNNING", "PENDING")
    jobs = [replace(JOB, id=str(n), number=str(n), state=word, end=float(n)) for n, word in enumerate(words, 1)]
    JobFolder(tmp_path).submitted("1", "test", "1", [])
    for known, expected in ((jobs, "3"), (jobs[:2], "2"), ([*jobs[:2], jobs[3]], "4")):
        assert join(read_files(tmp_path), known, asked=True).job == expected
    assert join(read_files(tmp_path), jobs, asked=True).more_jobs == ["4"]


def test_why_it_failed_is_what_the_policy_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(tmp_path, None)
    local = tmp_path / "local"
    ended(local, None, job=None)
    for run, way_on in ((tmp_path, "duet resume"), (local, f"duet train {local}/config.yaml")):
        assert join(read_files(run), [], asked=True).why.endswith(f"said nothing; `{way_on}` goes on")
    mistaken = tmp_path / "mistaken"
    with pytest.raises(RunError), Lease.acquire(mistaken):
        raise RunError("no such dataset")
    assert join(read_files(mistaken), [], asked=True).why == "RunError: no such dataset"
    folder = JobFolder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder.failed(Failure("7", 0, 9, "Killed \x1b[2J\nand more", step=12, rank=3, host="n2"))
    assert join(read_files(tmp_path), [], asked=True).why == "step 12, rank 3 on n2: Killed \x1b[2J and more"
    folder.decided("STOP", "the same failure twice", 9, "none")
    assert join(read_files(tmp_path), [replace(JOB, state="FAILED")], asked=True).why == "the same failure twice"
    folder.exclude("n2", "too slow")
    shown = duet("status", str(tmp_path)).stdout
    assert "rank 3 on n2: Killed  [2J and more" in shown, "it does not steer the terminal"
    assert "avoided     n2: too slow" in shown and ": stop: the same failure twice" in shown


def test_when_the_job_ends_or_ended(tmp_path: Path) -> None:
    ended(tmp_path, "FINISHED")
    for end, label in ((NOW - 60, "job ended"), (NOW + 60, "job ends ")):
        shown = _block(join(read_files(tmp_path), [replace(JOB, end=end)], asked=True), NOW)
        assert [line[:9] for line in shown if line.startswith("job e")] == [label]


def test_runs_of_a_study_are_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = ["runs/first", "runs/slurm", "runs/small/core/masks/seed-1", "runs/small/rates/low/masks/seed-1"]
    for run in (*runs, "runs/mlartifacts/1/first", "runs/.old/second", "runs/a/b/c/d/e/too-deep"):
        ended(Path(run), "FINISHED")
    Path("runs/small/slurm/0").mkdir(parents=True)
    Path("runs/small/slurm/0/0").symlink_to(Path("runs/first").absolute())  # as of a sweep
    found, _ = statuses([Path("runs")])
    assert sorted(one.run for one in found) == sorted(run.path for run in list_runs(Path("runs"))) == runs
    assert [one.run for one in statuses([Path("runs/small/core")])[0]] == runs[2:3]
    assert complete_runs("runs/") == ["runs/a/", "runs/first", "runs/slurm", "runs/small/"]


def test_damaged_folders_are_named_and_hide_nothing(tmp_path: Path) -> None:
    ended(tmp_path / "good", "FINISHED")
    for name, file, text in (
        ("attempt", "attempts/000001.json", '{"attempt": 1, "sta'),
        ("attempt-2", "attempts/000001.json", "[]"),
        ("beat-2", "heartbeat", "[" * 100_000),
        ("beat-3", "heartbeat", ""),
        ("config-3", "config.yaml", "[" * 5000),
        ("run", "run.json", "[" * 100_000),
        ("decisions", "slurm/decisions.jsonl", '[]\n{"job": []}\n'),
        ("failures", "slurm/failures.jsonl", '{"job": 7, "restart": 0, "rc": "x", "what": 3, "time": "t"}\n'),
        ("excluded", "slurm/exclude.jsonl", '{"node": [1]}\n{"node": "n1", "time": "t"}\n'),
        ("journal", "metrics.jsonl", "no journal\n"),
        ("beat", "heartbeat", '{"step": "x", "attempt": 1, "time": []}'),
        ("config", "config.yaml", "train: [\n"),
        ("config-2", "config.yaml", "train: 3"),
        ("jobs", "slurm/jobs.jsonl", '{"jo\n7\n{"job": "7"}\n'),
        ("checkpoint", "checkpoints/step-000000002/nothing", ""),
    ):
        ended(tmp_path / name, "FINISHED")
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(text)
    found, _ = statuses([tmp_path])
    states = {Path(one.run).name: one.state for one in found}
    assert states.pop("attempt") == states.pop("attempt-2") == states.pop("journal") == "unreadable"
    assert set(states.values()) == {"finished"} and len(states) == 13
    assert {one.run: one.why for one in found}[str(tmp_path / "attempt")].startswith(f"{tmp_path}/attempt/attempts")
    shown = duet("status", str(tmp_path)).stdout.splitlines()
    assert shown[0].split()[:3] == ["RUN", "STATE", "JOB"] and len(shown) >= 10


def test_a_folder_of_hundreds_takes_little_more_than_reading_their_journals(tmp_path: Path) -> None:
    ended(tmp_path / "run-000", "FINISHED")
    config = (ROOT / "configs" / "run" / "quickstart.yaml").read_text()
    for number in range(300):
        run = tmp_path / f"run-{number:03d}"
        (run / "attempts").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "attempts/000001.json", "heartbeat"):
            if number:
                os.link(tmp_path / "run-000" / name, run / name)
        (run / "config.yaml").write_text(config)
    clock = time.process_time  # what else the machine does is no part of it
    since = clock()
    list_runs(tmp_path)
    listed = clock()
    found, _ = statuses([tmp_path])
    done = clock()
    print(f"300 runs: listed in {listed - since:.2f} s, with status in {done - listed:.2f} s")
    assert len(found) == 300 and {one.state for one in found} == {"finished"}
    assert done - listed < 15 * (listed - since)


def test_the_command_without_slurm(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    ended(tmp_path / "runs" / "a", "KILLED")
    JobFolder(tmp_path / "runs" / "b").submitted("7", "test", "2", [])
    here = {"cwd": tmp_path, "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(ROOT)}
    shown = duet("status", **here)  # type: ignore[arg-type]
    assert "runs/a  stopped" in shown.stdout and "runs/b  submitted" in shown.stdout, shown.stderr
    assert shown.stdout.splitlines()[-1] == "no Slurm here: from the run folders alone"
    for words, said in (
        (["status", "nowhere"], "nowhere: no such folder"),
        (["logs", "runs"], "runs: not a run folder"),
        (["logs", "runs/b"], "no log yet (submitted"),
        (["cancel", "runs/a"], "squeue: no such program here"),
        (["resume", "runs/a"], "squeue: no such program here"),
    ):
        refused = duet(*words, **here)  # type: ignore[arg-type]
        assert refused.returncode == 2 and said in refused.stderr, refused


def test_watch_redraws_and_ends_quietly_with_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").touch()
    main, side = pty.openpty()
    with training(tmp_path):
        command = [sys.executable, "-P", "-m", "launch.cli", "status", str(tmp_path), "--watch", "--every", "1"]
        process = subprocess.Popen(
            ["env", "--default-signal=INT", *command],
            cwd=ROOT,
            stdin=side,
            stdout=side,
            stderr=side,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(side)
        shown = b""

        def drawn() -> bool:
            nonlocal shown
            shown += os.read(main, 1 << 16)
            return shown.count(b"Ctrl-C ends") >= 2

        try:
            wait_until(drawn, 60, "a second look")
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # the other end is closed
                while more := os.read(main, 1 << 16):
                    shown += more
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(main)
    assert b"Traceback" not in shown and b"Aborted" not in shown
    assert b"running" in shown.rpartition(b"\x1b[?1049l")[2], "the last look stays on the screen"


def test_tab_completes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        JobFolder(tmp_path / "runs" / name).submitted("7", "test", "2", [])
    assert complete_runs("") == complete_runs("ru") == ["runs/"]
    assert complete_runs("runs/") == ["runs/first", "runs/second"]
    assert complete_runs("runs/s") == ["runs/second"]
    assert complete_runs("nowhere/s") == []
    shell = {"_DUET_COMPLETE": "complete_bash", "COMP_WORDS": "duet logs runs/f", "COMP_CWORD": "2"}
    program = "import sys\nfrom launch.cli import main\nsys.argv = ['duet']\nmain()"
    environment = os.environ | shell | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["runs/first"], done.stderr


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nb\nc", "a\nb\nc\n", "x" * 200_000 + "\ny\n", "\n\n\n"])
def test_the_last_lines_and_what_comes_after(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    log = tmp_path / "log"
    for number in range(5):
        log.write_text(text)
        tail = _Tail(log, number)
        tail.show()
        kept = text.splitlines(keepends=True)
        assert capfd.readouterr().out == "".join(kept[len(kept) - min(number, len(kept)) :])
        with open(log, "a") as file:
            file.write("more\n")
        assert tail.show() and not tail.show()
        assert capfd.readouterr().out == "more\n"
    log.write_text("new\n")  # the site truncates it at a requeue
    assert tail.show() and capfd.readouterr().out == "new\n"


def test_what_sacct_and_squeue_print() -> None:
    job = client._parse_sacct("12_3|15|CANCELLED by 1000|2|n[1-2]|main|me|2026-11-21T10:00:00|Unknown|None|0:15")
    assert (job.id, job.number, job.state, job.nodes) == ("12_3", "15", "CANCELLED", "n[1-2]")
    assert job.start is None and job.exit_code == 143
    assert job.ended and job.restarts is None
    times = {"0:45": 45, "05:06": 306, "04:05:06": 14706, "3-04:05:06": 273906, "UNLIMITED": None, "INVALID": None}
    assert {text: client._seconds(text) for text in times} == times
    codes = {"768": 3, "9": 137, "3:0": 3, "0:9": 137, "0": 0, "": None}
    assert {text: client._exit_code(text) for text in codes} == codes


@pytest.mark.parametrize("folder", ["plain", "a b", 'it\'s "so"'])
def test_the_log_that_the_script_names_whatever_the_folder(tmp_path: Path, folder: str) -> None:
    run = tmp_path / folder
    script = JobFolder(run).script
    script.parent.mkdir(parents=True)
    script.write_text(directive("--job-name=duet-x") + "\n" + directive(f"--output={run}/logs/slurm-%j.out") + "\n")
    assert _from_script(run, "7") == run / "logs" / "slurm-7.out"
