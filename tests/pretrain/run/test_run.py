"""A run folder has one owner at a time and belongs to one run."""

import json
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

from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.files.sealed import unseal, write_sealed
from pretrain.config.schema import load
from pretrain.run import lease as lease_module
from pretrain.run.job_records import Failure, Heartbeat, JobFolder, Pulse
from pretrain.run.journal import Journal
from pretrain.run.lease import GONE_SECONDS, Lease, LeaseLost, latest_attempt, read_owner
from pretrain.run.run_folder import RunFolder

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


def trained(path: Path, *args: str) -> RunFolder:
    """A run folder whose run has taken a step."""
    folder = RunFolder(path)
    folder.claim(load(list(args)), {"fingerprint": "f" * 64, "path": "data/x"})
    journal = Journal(folder.journal, 1)
    journal.metrics(1, {"loss/train": 1.0})
    journal.close()
    return folder


def test_a_folder_whose_run_took_no_step_belongs_to_nobody(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(load([]), {"fingerprint": "a" * 64, "path": "data/x"})
    folder.claim(load(["optimizer.lr=1"]), {"fingerprint": "b" * 64, "path": "data/y"})
    assert folder.config() == load(["optimizer.lr=1"])
    assert folder.facts()["dataset"]["fingerprint"] == "b" * 64


DAMAGED = (b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"format": 2, "dataset": {}}', b"\0" * 512)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_run_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    folder = trained(tmp_path)
    folder.run_file.write_bytes(content)
    for look in (folder.config, folder.facts, lambda: folder.claim(load([]), {"fingerprint": "f" * 64, "path": "x"})):
        with pytest.raises(RunError, match="run.json: damaged: .*restore it"):
            look()


def test_a_run_file_that_is_gone_is_missed(tmp_path: Path) -> None:
    """Else the run would go on as whatever it is started as."""
    folder = trained(tmp_path)
    folder.run_file.unlink()
    with pytest.raises(RunError, match="run.json is missing; restore it"):
        folder.claim(load(["optimizer.lr=1"]), {"fingerprint": "f" * 64, "path": "data/x"})


def test_an_edited_config_yaml_is_compared_with_the_run(tmp_path: Path) -> None:
    """It is a copy to start with, and damage to it does not matter to those who use the run."""
    folder, dataset = trained(tmp_path), {"fingerprint": "f" * 64, "path": "data/x"}
    text = folder.config_file.read_text()
    folder.config_file.write_text(text.replace("log_every: 10", "log_every: 7"))
    folder.claim(load([str(folder.config_file)]), dataset)
    folder.config_file.write_text(text.replace("lr: 0.0009", "lr: 0.0008"))
    with pytest.raises(RunError, match=r"optimizer.lr: 0.0009 in the run, 0.0008 now"):
        folder.claim(load([str(folder.config_file)]), dataset)
    folder.config_file.write_bytes(b"\xff")
    assert folder.config() == load([])


def flipped(content: bytes, number: int) -> bytes:
    """With one bit turned."""
    changed = bytearray(content)
    changed[number // 8] ^= 1 << number % 8
    return bytes(changed)


@pytest.mark.parametrize("flips", [300, pytest.param(20_000, marks=pytest.mark.drill)])
def test_no_bit_that_flips_in_run_json_is_taken_for_something_else(tmp_path: Path, flips: int) -> None:
    folder = trained(tmp_path)
    whole, facts, config = folder.run_file.read_bytes(), folder.facts(), folder.config()
    results = {"the same": 0, "refused": 0}
    for number in random.Random(16).sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        folder.run_file.write_bytes(flipped(whole, number))
        try:
            assert (folder.facts(), folder.config()) == (facts, config), f"bit {number} was accepted"
            results["the same"] += 1
        except RunError:
            results["refused"] += 1
    print(f"run.json: {sum(results.values())} flips: {results}")
    assert results["refused"] > results["the same"]


def test_a_run_folder_of_format_1_is_read_and_becomes_one_of_format_2(tmp_path: Path) -> None:
    """Its identity has no hash, and the configuration is that of config.yaml."""
    shutil.copytree(Path(__file__).parents[1] / "run-format-1", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    config, dataset = folder.config(), folder.facts()["dataset"]
    assert (config.optimizer.lr, folder.facts()["parameters"]) == (0.01, 10544)
    folder.claim(config, dataset)
    with pytest.raises(RunError, match="optimizer.lr"):
        folder.claim(load([str(folder.config_file), "optimizer.lr=1"]), dataset)
    folder.went_on(config, dataset)
    assert (folder.config(), folder.facts()["parameters"]) == (config, 10544)
    assert json.loads(folder.run_file.read_text())["format"] == 2
    folder.run_file.write_text('{"format": 1, "dataset": ["a"]}')
    with pytest.raises(RunError, match="run.json: damaged"):
        folder.facts()


def test_checkpoints_that_are_gone_are_missed(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    folder.check_never_saved()
    journal = Journal(folder.journal, 1)
    journal.event("checkpoint", step=7, path="checkpoints/step-000000007")
    journal.close()
    with pytest.raises(CheckpointError, match="a checkpoint of step 7"):
        folder.check_never_saved()


def test_a_run_of_constant_learning_rate_may_become_longer(tmp_path: Path) -> None:
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    folder = trained(tmp_path, "schedule.kind=constant", "train.steps=10")
    folder.claim(load(["schedule.kind=constant", "train.steps=20"]), dataset)
    with pytest.raises(RunError, match="schedule.kind"):
        folder.claim(load(["train.steps=20"]), dataset)


def test_the_end_of_a_wsd_run_may_move_until_its_cooldown_has_begun(tmp_path: Path) -> None:
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    wsd = ["schedule.kind=wsd", "schedule.cooldown=20", "schedule.warmup_steps=5"]
    folder = trained(tmp_path, *wsd, "train.steps=100")

    def claim(steps: int, *more: str) -> None:
        folder.claim(config := load([*wsd, f"train.steps={steps}", *more]), dataset)
        folder.went_on(config, dataset)

    def save(step: int) -> None:
        checkpoint = folder.checkpoints / f"step-{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()

    claim(60)
    save(80)
    with pytest.raises(RunError, match="begins after step 40, and the newest checkpoint is of step 80"):
        claim(100)
    (folder.checkpoints / "step-000000080" / "manifest.json").unlink()
    claim(100)
    save(79)
    claim(120)
    with pytest.raises(RunError, match=r"step 78, .*step 79; .* duet train --from .* train.steps=98"):
        claim(98)
    with pytest.raises(RunError, match="schedule.cooldown: 20 in the run, 10 now"):
        claim(120, "schedule.cooldown=10")


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(RunError, match="ffffffffffff .*bbbbbbbbbbbb"):
        folder.claim(load([]), {"fingerprint": "b" * 64, "path": "data/x"})


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        RunFolder(tmp_path).facts()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).config()
