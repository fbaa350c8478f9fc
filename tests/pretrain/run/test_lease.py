"""A run folder has one owner at a time."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal, write_sealed
from pretrain.run import lease as lease_module
from pretrain.run.job_records import Failure, Heartbeat, JobFolder, Pulse
from pretrain.run.lease import GONE_SECONDS, Lease, LeaseLost, latest_attempt, read_owner
from tests.pretrain.run.damage import flipped

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import sys, time; from pathlib import Path; from pretrain.run.lease import Lease; "
    "Lease.acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
)


def hold(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_start_refuses_and_names_the_owner_until_it_is_killed(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    try:
        with pytest.raises(RunError, match=rf"attempt 1: process {owner.pid} on"):
            Lease.acquire(tmp_path)
    finally:
        owner.kill()
        owner.wait()
    with Lease.acquire(tmp_path) as lease:
        assert lease.attempt == 2
    with Lease.acquire(tmp_path) as lease:
        assert lease.attempt == 3


def test_a_stopped_owner_still_owns(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    try:
        owner.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError):
            Lease.acquire(tmp_path)
    finally:
        owner.kill()
        owner.wait()


def _race(run_dir: str, barrier: Any, won: Any) -> None:
    barrier.wait()
    try:
        Lease.acquire(Path(run_dir))
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
    assert sum(won.get(timeout=120) for _ in starts) == 1
    for start in starts:
        start.join()
    assert latest_attempt(tmp_path) == 2


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The record of an owner on another machine; it never said that it ended."""
    with Lease.acquire(tmp_path):
        pass
    file = tmp_path / "attempts" / "000001.json"
    record = unseal(file.read_bytes()) | {"pid_space": "elsewhere", "host": "n7", "job": "6"}
    del record["ended"]
    write_sealed(file, record)
    return file


class Clock:
    """Of this machine, which stands still but for sleeps; `between` is what others do meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, between: Callable[[], object] = lambda: None) -> None:
        self.now, self.between = 1000.0, between
        monkeypatch.setattr(lease_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(lease_module.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.between()


@pytest.mark.parametrize("ahead", [-86400.0, -1.0, 0.0, 3600.0, 10 * 365 * 86400.0])
@pytest.mark.parametrize(
    "damage", [None, b"", b'{"attempt": 1, "sta', b"[]", b"\xff\0", b"[" * 100_000, b'{"attempt": "1"}']
)
def test_an_owner_elsewhere_is_gone_when_its_file_has_not_changed_for_a_while(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, damage: bytes | None
) -> None:
    """Whatever the clocks say, and however the record is torn; and it is said who is waited for, and how long."""
    if damage is not None:
        elsewhere.write_bytes(damage)
    os.utime(elsewhere, (time.time() + ahead,) * 2)
    clock, told = Clock(monkeypatch), list[str]()
    with Lease.acquire(elsewhere.parent.parent, told.append) as lease:
        assert lease.attempt == 2
    assert GONE_SECONDS <= clock.now - 1000.0 < GONE_SECONDS + 1
    assert len(told) == 1
    assert "attempt 1: " in told[0] and "30 s" in told[0]
    assert ("job 6, process" in told[0] and "on n7" in told[0]) == (damage is None)


@pytest.mark.parametrize("ahead", [-86400.0, 3600.0])
@pytest.mark.parametrize("damage", [None, b""])
def test_an_owner_elsewhere_whose_heart_beats_is_left_alone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, damage: bytes | None
) -> None:
    if damage is not None:
        elsewhere.write_bytes(damage)
    start = time.time() + ahead
    os.utime(elsewhere, (start, start))
    clock = Clock(monkeypatch)
    clock.between = lambda: os.utime(elsewhere, (start + (clock.now - 1000) // 5,) * 2)
    with pytest.raises(RunError, match=r"another start owns this run folder \(attempt 1"):
        Lease.acquire(elsewhere.parent.parent, lambda _: None)
    assert clock.now - 1000.0 < 6


@pytest.mark.parametrize("alive", [True, False])
def test_while_the_file_system_does_not_answer_nobody_counts_as_gone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """It fails over for 90 s, in which no heart can beat; 5 s later that of a live owner has."""
    clock = Clock(monkeypatch)
    paused = 1000 + GONE_SECONDS - 1

    def between() -> None:
        if paused <= clock.now < paused + 90:
            clock.now += 90
        if alive and clock.now > paused + 95:
            os.utime(elsewhere)

    clock.between = between
    if alive:
        with pytest.raises(RunError, match="another start owns this run folder"):
            Lease.acquire(elsewhere.parent.parent, lambda _: None)
    else:
        with Lease.acquire(elsewhere.parent.parent, lambda _: None):
            assert 2 * GONE_SECONDS + 88 < clock.now - 1000 < 2 * GONE_SECONDS + 91


def test_an_owner_repairs_its_damaged_record(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path) as lease:
        file = tmp_path / "attempts" / "000001.json"
        whole = file.read_bytes()
        for damage in (b"", flipped(whole, 8 * whole.index(b'"nonce": "') + 80)):
            file.write_bytes(damage)
            lease.check()
            assert file.read_bytes() == whole


@pytest.mark.parametrize("flips", [200, pytest.param(20_000, marks=pytest.mark.drill)])
def test_no_bit_that_flips_in_an_attempt_or_heartbeat_is_taken_for_something_else(tmp_path: Path, flips: int) -> None:
    with Lease.acquire(tmp_path):
        pass
    folder = JobFolder(tmp_path)
    Pulse(folder).beat(Heartbeat(7, 1, 2.5, 100.0, 5))
    folder.submitted("7", "test", "2", ["a"])
    folder.exclude("n1", "slow")
    folder.failed(Failure("7", 0, 9, "killed", step=3))
    folder.request_requeue(7, 3)
    readers: dict[str, tuple[Callable[[], object], tuple[object, ...]]] = {
        "attempts/000001.json": (lambda: read_owner(tmp_path / "attempts" / "000001.json"), (None,)),
        "heartbeat": (folder.last_heartbeat, (None,)),
        "slurm/jobs.jsonl": (folder.submissions, ([],)),
        "slurm/exclude.jsonl": (folder.excluded, ([],)),
        "slurm/failures.jsonl": (folder.failures, ([],)),
        "slurm/wants-requeue": (folder.requeue_wish, (None,)),
    }
    for name, (read, nothing) in readers.items():
        whole, expected = (tmp_path / name).read_bytes(), read()
        numbers = random.Random(3).sample(range(8 * len(whole)), min(flips, 8 * len(whole)))
        for number in numbers:
            (tmp_path / name).write_bytes(flipped(whole, number))
            found = read()
            if isinstance(found, list) and isinstance(expected, list) and found and isinstance(found[0], dict):
                found = [{key: found[0].get(key) for key in expected[0]}]  # the name of the hash may have suffered
            assert found in (expected, *nothing), f"{name}: bit {number} was accepted"
        print(f"{name}: {len(numbers)} flips, none accepted as something else")
        (tmp_path / name).write_bytes(whole)


def test_an_earlier_start_of_the_same_job_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the loss of a node: its heart seems to beat for GONE_SECONDS, but Slurm has requeued the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = Lease.acquire(tmp_path)
    with pytest.raises(RunError, match="job 7"):
        Lease.acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(RunError, match="job 7"):
        Lease.acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with Lease.acquire(tmp_path) as lease:
        assert lease.attempt == 2
        with pytest.raises(LeaseLost):  # should it be alive after all
            lost.check()
    lost.release("over")


def taken_over(run_dir: Path) -> None:
    (run_dir / "attempts" / "000002.json").write_text("{}")


def removed(run_dir: Path) -> None:
    shutil.rmtree(run_dir)


def removed_and_owned_by_another(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    other = hold(run_dir)
    other.kill()
    other.wait()


@pytest.mark.parametrize("what", [taken_over, removed, removed_and_owned_by_another])
def test_an_owner_that_lost_its_folder_notices_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    run_dir = tmp_path / "run"
    lease = Lease.acquire(run_dir)
    lease.check()
    what(run_dir)
    with pytest.raises(LeaseLost):
        lease.check()
    wait_for(lambda: lease.lost)
    before = sorted((p, p.read_text()) for p in run_dir.rglob("*.json"))
    lease.release("lost")
    assert sorted((p, p.read_text()) for p in run_dir.rglob("*.json")) == before


def test_the_heartbeat_keeps_the_lease_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    with Lease.acquire(tmp_path) as lease:
        file = tmp_path / "attempts" / "000001.json"
        os.utime(file, (0, 0))
        wait_for(lambda: file.stat().st_mtime > 0)
        assert not lease.lost


def wait_for(condition: Callable[[], bool], timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
