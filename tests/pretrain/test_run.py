"""A run folder has one owner at a time and belongs to one run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError
from pretrain import lease as lease_module
from pretrain.config import load
from pretrain.lease import STALE_SECONDS, Lease, latest_attempt
from pretrain.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from pretrain.lease import Lease; "
    "Lease.acquire(Path(sys.argv[1]), lambda: None); print('held', flush=True); time.sleep(600)"
)


def hold(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_start_refuses_and_names_the_owner_until_it_is_killed(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    try:
        with pytest.raises(RunError, match=rf"attempt 1: process {owner.pid} on"):
            Lease.acquire(tmp_path, lambda: None)
    finally:
        owner.kill()
        owner.wait()
    with Lease.acquire(tmp_path, lambda: None) as lease:
        assert lease.attempt == 2
    with Lease.acquire(tmp_path, lambda: None) as lease:
        assert lease.attempt == 3


def test_a_stopped_owner_still_owns(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    try:
        owner.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError):
            Lease.acquire(tmp_path, lambda: None)
    finally:
        owner.kill()
        owner.wait()


def _race(run_dir: str, barrier: Any, won: Any) -> None:
    barrier.wait()
    try:
        Lease.acquire(Path(run_dir), lambda: None)
    except RunError:
        won.put(0)
    else:
        won.put(1)
        barrier.wait()  # own it until all have tried
        return
    barrier.wait()


def test_of_many_simultaneous_takeovers_one_wins(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    owner.kill()
    owner.wait()
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(8), context.Queue()
    starts = [context.Process(target=_race, args=(str(tmp_path), barrier, won)) for _ in range(8)]
    for start in starts:
        start.start()
    assert sum(won.get(timeout=30) for _ in starts) == 1
    for start in starts:
        start.join()
    assert latest_attempt(tmp_path) == 2


def test_an_owner_on_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, lambda: None):
        pass
    record_file = tmp_path / "attempts" / "000001.json"
    record = json.loads(record_file.read_text()) | {"pid_space": "elsewhere", "host": "n7"}
    del record["ended"]
    record_file.write_text(json.dumps(record))
    with pytest.raises(RunError, match="on n7"):
        Lease.acquire(tmp_path, lambda: None)
    old = record_file.stat().st_mtime - STALE_SECONDS - 1
    os.utime(record_file, (old, old))
    with Lease.acquire(tmp_path, lambda: None) as lease:
        assert lease.attempt == 2


def test_an_owner_that_was_taken_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    lost = threading.Event()
    lease = Lease.acquire(tmp_path, lost.set)
    (tmp_path / "attempts" / "000002.json").write_text("{}")
    assert lost.wait(10)
    lease.release("taken over")


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ("optimizer.lr=1", False),
        ("run.seed=1", False),
        ("model.width=64", False),
        ("train.steps=11", False),
        ("engine.zero_stage=3", True),
        ("batch.micro_batch=2", True),
        ("train.log_every=1", True),
        ("tracking.mode=off", True),
    ],
)
def test_what_may_change_at_a_resume(tmp_path: Path, change: str, fine: bool) -> None:
    folder = RunFolder(tmp_path)
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    folder.claim(load([]), dataset)
    folder.claim(load([]), dataset)
    if fine:
        folder.claim(load([change]), dataset)
        assert folder.config() == load([change])
    else:
        with pytest.raises(RunError, match=change.split("=")[0]):
            folder.claim(load([change]), dataset)
        assert folder.config() == load([])


def test_a_run_of_constant_learning_rate_may_become_longer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    folder.claim(load(["schedule.kind=constant", "train.steps=10"]), dataset)
    folder.claim(load(["schedule.kind=constant", "train.steps=20"]), dataset)
    with pytest.raises(RunError, match="schedule.kind"):
        folder.claim(load(["train.steps=20"]), dataset)


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(load([]), {"fingerprint": "a" * 64, "path": "data/x"})
    with pytest.raises(RunError, match="aaaaaaaaaaaa .*bbbbbbbbbbbb"):
        folder.claim(load([]), {"fingerprint": "b" * 64, "path": "data/x"})


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        RunFolder(tmp_path).facts()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).config()
