"""What runs there are, from their folders alone."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal, write_sealed
from pretrain.run.journal import Journal
from pretrain.run.lease import STALE_SECONDS, Lease
from pretrain.run.run_listing import MOST_TAIL_BYTES, TAIL_BYTES, RunState, list_runs, run_state
from tests.runs import ROOT, duet


def steps(journal: Journal, first: int, last: int, **more: float) -> None:
    for step in range(first, last + 1):
        journal.metrics(step, {"loss/train": 5.0 / step} | more | {"time/tokens_per_second": 1000.0 + step})


def finished(run_dir: Path, status: str = "FINISHED") -> None:
    with Lease.acquire(run_dir) as lease:
        journal = Journal(run_dir / "metrics.jsonl", lease.attempt)
        journal.event("start", resumed_from=None)
        steps(journal, 1, 10)
        journal.event("end", status=status, reason="a reason")
        journal.event("warning", text="said after the end")
        journal.close()


def killed_by_the_system(run_dir: Path) -> None:
    """A real process that owns the run, writes one step, and is killed without a word."""
    program = (
        "import os, signal, sys, pathlib\n"
        "from pretrain.run.journal import Journal\n"
        "from pretrain.run.lease import Lease\n"
        "run_dir = pathlib.Path(sys.argv[1])\n"
        "lease = Lease.acquire(run_dir)\n"
        "journal = Journal(run_dir / 'metrics.jsonl', lease.attempt)\n"
        "journal.event('start', resumed_from=None)\n"
        "journal.metrics(7, {'loss/train': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    done = subprocess.run([sys.executable, "-c", program, str(run_dir)], cwd=ROOT, env=environment)
    assert done.returncode == -9


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", "FAILED"])
def test_a_run_that_said_how_it_ended(tmp_path: Path, status: str) -> None:
    finished(tmp_path, status)
    run = run_state(tmp_path)
    assert (run.state, run.step, run.loss, run.tokens_per_second) == (status.lower(), 10, 0.5, 1010.0)


def test_running_and_dead(tmp_path: Path) -> None:
    killed_by_the_system(tmp_path)
    run = run_state(tmp_path)
    assert (run.state, run.step, run.loss, run.job, run.attempts) == ("dead", 7, 2.0, "4711", 1)
    with Lease.acquire(tmp_path):
        assert run_state(tmp_path).state == "running", "starting up: the journal is still that of the dead attempt"
    with pytest.raises(RunError), Lease.acquire(tmp_path):
        raise RunError("a mistake")
    run = run_state(tmp_path)
    assert run.state == "failed", "it ended in order, before it had begun to train"
    assert run.problem == "RunError: a mistake"


def test_an_owner_on_another_machine_lives_while_its_heart_beats(tmp_path: Path) -> None:
    killed_by_the_system(tmp_path)
    file = tmp_path / "attempts" / "000001.json"
    write_sealed(file, unseal(file.read_bytes()) | {"pid_space": "elsewhere"})
    before = sorted(path.name for path in file.parent.iterdir())
    assert run_state(tmp_path).state == "running"
    past = time.time() - STALE_SECONDS - 1
    os.utime(file, (past, past))
    assert run_state(tmp_path).state == "dead"
    assert sorted(path.name for path in file.parent.iterdir()) == before, "a listing writes nothing"


def test_a_mistaken_start_does_not_change_how_a_finished_run_stands(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(RunError), Lease.acquire(tmp_path):
        assert run_state(tmp_path).state == "running"
        raise RunError("another configuration")
    assert run_state(tmp_path).state == "finished"


def test_only_the_end_of_a_long_journal_is_read(tmp_path: Path) -> None:
    """Its beginning is no journal at all, and nobody notices; the speed stands far before the end, and is found."""

    def fill(num_bytes: int) -> None:
        for _ in range(num_bytes // 1000):
            journal.event("sample", step=5, text="x" * 1000)

    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write("no journal\n" * (2 * MOST_TAIL_BYTES // 11))
    journal = Journal(tmp_path / "metrics.jsonl", 1)
    fill(8 * TAIL_BYTES)
    steps(journal, 1, 5)
    fill(2 * TAIL_BYTES)
    journal.metrics(6, {"loss/train": 0.25})
    assert run_state(tmp_path) == RunState(
        path=str(tmp_path),
        state="dead",
        step=6,
        loss=0.25,
        tokens_per_second=1005.0,
        job=None,
        attempts=0,
        started=tmp_path.stat().st_mtime,
    )


def test_a_line_that_is_being_written_and_a_damaged_journal(tmp_path: Path) -> None:
    finished(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"format": 1, "ki')
    assert run_state(tmp_path).state == "finished"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n")
    run = run_state(tmp_path)
    assert (run.state, run.step) == ("finished", 10), "a damaged line is passed over"


def bytes_read() -> int:
    """By this process so far, from anywhere."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_two_hundred_long_runs_are_listed_at_once_newest_first(tmp_path: Path) -> None:
    for number in range(200):
        run_dir = tmp_path / f"run-{number:03d}"
        if number:
            (run_dir / "attempts").mkdir(parents=True)
            os.link(tmp_path / "run-000" / "metrics.jsonl", run_dir / "metrics.jsonl")
            (run_dir / "attempts" / "000001.json").write_text(
                json.dumps({"started": 1e9 + number, "ended": 1.0, "attempt": 1, "job": None})
            )
        else:
            with Lease.acquire(run_dir) as lease:
                journal = Journal(run_dir / "metrics.jsonl", lease.attempt)
                journal.event("start", resumed_from=None)
                steps(journal, 1, 3000, **{f"gate/density/site/{layer:02d}": 0.123456789 for layer in range(48)})
                journal.event("end", status="FINISHED", reason="all steps done")
                journal.close()
    (tmp_path / "no-run").mkdir()
    size = (tmp_path / "run-000" / "metrics.jsonl").stat().st_size
    before = bytes_read()
    runs = list_runs(tmp_path)
    assert bytes_read() - before < 200 * 2 * TAIL_BYTES < 200 * size / 8
    assert [Path(run.path).name for run in runs] == ["run-000", *(f"run-{n:03d}" for n in range(199, 0, -1))]
    assert {(run.state, run.step) for run in runs} == {("finished", 3000)}


def test_the_command_prints_columns_and_json(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    journal = Journal(tmp_path / "a" / "metrics.jsonl", 1)
    journal.metrics(11, {"loss/train": math.nan})
    killed_by_the_system(tmp_path / "b")
    listed = duet("runs", "ls", cwd=tmp_path)
    assert listed.returncode == 2
    assert "runs: no such folder" in listed.stderr
    listed = duet("runs", "ls", ".", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert lines[0] == ["RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "JOB", "AGE"]
    assert [line[:-1] for line in lines[1:]] == [
        ["b", "dead", "7", "2.0000", "-", "4711"],
        ["a", "finished", "11", "nan", "1010", "-"],
    ]
    [run, other] = json.loads(duet("runs", "ls", str(tmp_path), "--json").stdout)
    assert (run["state"], run["loss"], run["tokens_per_second"], run["job"]) == ("dead", 2.0, None, "4711")
    assert other["loss"] == "nan"
    assert len(json.loads(duet("runs", "ls", str(tmp_path / "a"), "--json").stdout)) == 1, (
        "a run folder is its own list"
    )
