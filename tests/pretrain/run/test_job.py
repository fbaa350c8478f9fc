"""The records that ranks, batch script, policy and command line share."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors
from pretrain.run.job_records import Failure, FailureFile, Heartbeat, JobFolder, Pulse, RankFailure, this_job
from tests.runs import ROOT


def test_an_empty_run_folder_knows_nothing(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.submissions() == folder.excluded() == folder.failures() == folder.rank_failures("7", 0) == []
    assert folder.last_heartbeat() is None
    assert folder.requeue_wish() is None
    assert not list(tmp_path.iterdir()), "reading makes nothing"


def test_what_is_recorded_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    folder = JobFolder(tmp_path)
    folder.submitted("7", "local", "2-4", ["duet", "submit"])
    folder.submitted("8", "local", "2", [], array="0-3")
    assert [(line["job"], line["nodes"], line.get("array")) for line in folder.submissions()] == [
        ("7", "2-4", None),
        ("8", "2", "0-3"),
    ]
    folder.exclude("n1", "no memory")
    folder.exclude("n2", "no disk")
    folder.exclude("n1", "no launch")
    assert [(line["node"], line["reason"], line["job"]) for line in folder.excluded()] == [
        ("n1", "no launch", "7"),
        ("n2", "no disk", "7"),
    ]
    failure = Failure("7", 2, 1, "a bug", step=5, rank=1, host="n2", samples=[3, 4], checkpoint=4)
    folder.failed(failure)
    assert folder.failures() == [failure]
    folder.request_requeue(12, trained=3)
    wish = folder.requeue_wish()
    assert wish
    assert (wish.step, wish.trained, wish.job, wish.restart) == (12, 3, "7", 2)
    heartbeat = Heartbeat(12, 3, loss=2.5)
    assert (heartbeat.job, heartbeat.restart) == this_job() == ("7", 2)
    Pulse(folder).beat(heartbeat)
    assert folder.last_heartbeat() == heartbeat


def test_what_each_start_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = JobFolder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder.exclude("n3", "why")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder.exclude("n4", "again")
    assert (folder.excluded_by("7", 0), folder.excluded_by("7", 1)) == (["n3"], ["n4"])


def test_the_ranks_of_one_start_only_and_the_cause_first(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    late, early = (RankFailure("7", 1, rank, "n1", "why", time=10.0 - rank) for rank in (0, 1))
    for failure in (late, early, RankFailure("7", 0, 0, "n1", "before"), RankFailure("71", 1, 0, "n1", "other")):
        folder.rank_failed(failure)
    assert folder.rank_failures("7", 1) == [early, late]


@pytest.mark.parametrize("torn", [b"", b"{", b"null\n", b'"text"\n', b"[1]\n", b'{"job": "7"}\n', b"\xff\xfe", b"\n\n"])
def test_torn_and_foreign_lines_lose_no_others(tmp_path: Path, torn: bytes) -> None:
    folder = JobFolder(tmp_path)
    first, second = Failure("7", 0, 1, "first"), Failure("7", 1, 1, "second")
    folder.failed(first)
    with open(folder.path / "failures.jsonl", "ab") as file:
        file.write(torn)
    folder.failed(second)
    with open(folder.path / "failures.jsonl", "ab") as file:  # of a newer version, and one that is being written
        file.write(json.dumps(asdict(second) | {"new": 1}).encode() + b"\n" + json.dumps(asdict(first)).encode()[:-9])
    assert folder.failures() == [first, second, second]


def test_a_reader_never_sees_half_a_heartbeat(tmp_path: Path) -> None:
    folder, stop = JobFolder(tmp_path), threading.Event()
    Pulse(folder).beat(Heartbeat(0, 1))

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            Pulse(folder).beat(Heartbeat(step, 1))  # each its own, so that none is left out for speed

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [folder.last_heartbeat() for _ in range(500)]
        while seen[-1] == seen[0]:
            seen.append(folder.last_heartbeat())
    finally:
        stop.set()
        writer.join()
    assert None not in seen
    steps = [heartbeat.step for heartbeat in seen if heartbeat]
    assert steps == sorted(steps)
    assert len(set(steps)) > 1


def test_a_slow_file_system_gets_fewer_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, replace = [0.0], os.replace
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def slow(source: str, target: str, **where: int) -> None:
        clock[0] += 0.02
        replace(source, target, **where)

    monkeypatch.setattr("os.replace", slow)
    pulse, folder, written = Pulse(JobFolder(tmp_path)), JobFolder(tmp_path), set()
    for step in range(100):
        clock[0] += 0.1
        pulse.beat(Heartbeat(step, 1))
        found = folder.last_heartbeat()
        assert found
        written.add(found.step)
    assert written == {0, 20, 40, 60, 80}


def test_a_kill_while_appending_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pretrain.run.job_records import *\n"
        "folder = JobFolder(Path(sys.argv[1]))\n"
        "while True: folder.failed(Failure('7', 0, 1, 'x' * 5000)); print(flush=True)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    found = JobFolder(tmp_path).failures()
    assert len(found) >= 6
    assert {failure.what for failure in found} == {"x" * 5000}


def test_it_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import pretrain.run.job_records"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_full_disk_is_a_mistake_wherever_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal's own error is seen first, what it means only further out."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    failure_file = FailureFile(0)
    with pytest.raises(RunError), failure_file, disk_errors(tmp_path, RunError), failure_file:
        failure_file.at(3, 16, 8)
        raise OSError(errno.ENOSPC, "No space left on device")
    [failure] = JobFolder(tmp_path).rank_failures("7", 0)
    assert (failure.mistake, failure.step, failure.samples) == (True, 3, [16, 23])
    assert "the disk is full" in failure.what
