"""Long proofs of tracking: faults that overlap, and whole training runs."""

import random
import signal
import time
from pathlib import Path

import pytest

from pretrain.run.journal import read
from pretrain.tracking.follower import sync, unsent
from pretrain.tracking.mlflow_state import State
from tests.faults.tracked import Gate, Server, Writer, assert_mirrors, run_of, until
from tests.runs import ROOT, SMALL, duet, kill, start_duet, wait_for_step, wait_until_gone

pytestmark = pytest.mark.drill
ATTEMPTS = 5
MANY = 26_000
"""More points of a metric than MLflow gives out on one page."""


@pytest.fixture
def server(tmp_path: Path) -> "Server":
    return Server(tmp_path / "server")


def test_faults_in_any_order_over_many_attempts(server: Server, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    run_dir = tmp_path / "a"
    up, stopped, step = False, False, 0
    try:
        for attempt in range(ATTEMPTS):
            resumed_from = max(0, step - 100) // 100 * 100
            writer = Writer(run_dir, server.uri, resumed_from=resumed_from or None)
            step = resumed_from
            for _ in range(8):
                writer.tell(f"steps {step + 1} {step + 150}")
                step += 150
                writer.tell(f"system n{choose.randrange(3)} {step} {step + 20}")
                fault = choose.choice(["kill", "start", "stop", "go on", "wait"])
                if fault == "kill" and up:
                    server.kill()
                    up = stopped = False
                elif fault == "start" and not up:
                    server.start()
                    up = True
                elif fault == "stop" and up and not stopped:
                    server.signal(signal.SIGSTOP)
                    stopped = True
                elif fault == "go on" and stopped:
                    server.signal(signal.SIGCONT)
                    stopped = False
                elif fault == "wait" and up and not stopped:
                    writer.tell("shipped")
            if attempt == ATTEMPTS - 1:
                writer.tell(f"steps {step + 1} {step + MANY}")
                writer.end(timeout=2.0)
            else:
                writer.die()
        if stopped:
            server.signal(signal.SIGCONT)
        if not up:
            server.start()
        server.wait()
        assert sync(run_dir).status == "FINISHED"
        assert assert_mirrors(run_dir) > 6 * MANY
        assert run_of(run_dir).data.tags["restarts"] == str(ATTEMPTS - 1)
    finally:
        server.kill()


def test_a_server_that_takes_six_seconds_a_call(server: Server, tmp_path: Path) -> None:
    """More than a call has at first: the mirror catches up while the run goes on, and the end does not wait for it."""
    server.start()
    gate = Gate(None, server.port, seconds=6.0)
    try:
        writer = Writer(tmp_path / "a", gate.uri)
        for first in range(1, 2001, 100):
            writer.tell(f"steps {first} {first + 99}")
        until(lambda: sent(tmp_path / "a"), 600.0)
        writer.tell("steps 2001 2100")
        assert not writer.end(timeout=2.0)
        assert unsent(tmp_path / "a") == "not there yet: steps from 2001 on"
        assert len(writer.warnings()) <= 2
        assert sync(tmp_path / "a").status == "FINISHED"
        assert_mirrors(tmp_path / "a")
    finally:
        gate.close()
        server.kill()


def sent(run_dir: Path) -> bool:
    state = State.load(run_dir)
    return state is not None and state.offsets.get("metrics.jsonl") == (run_dir / "metrics.jsonl").stat().st_size


def test_a_training_run_through_a_server_that_dies_and_its_own_death(server: Server, tmp_path: Path) -> None:
    """With the real command line and two ranks."""
    dataset, run_dir = tmp_path / "data", tmp_path / "runs" / "a"
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    assert duet("data", "build", "data/characters", source, f"data.path={dataset}").returncode == 0
    steps = ["train.steps=3000", "train.checkpoint_every=100", "train.eval_every=1000"]
    tracked = ["tracking.mode=online", f"tracking.uri={server.uri}", "--ranks", "2"]
    command = ["train", *SMALL, f"data.path={dataset}", f"run.dir={run_dir}", *steps, *tracked]
    journal = run_dir / "metrics.jsonl"
    try:
        server.start()
        process = start_duet(*command, log=tmp_path / "log", new=True)
        wait_for_step(journal, 150, process)
        server.kill()
        wait_for_step(journal, 300, process)
        server.start()
        kill(process)
        wait_until_gone(run_dir)
        assert sync(run_dir).status == "KILLED"
        assert_mirrors(run_dir)

        process = start_duet(*command, log=tmp_path / "log", new=True)
        wait_for_step(journal, max(r.step or 0 for r in read(journal)) + 150, process)
        server.kill()
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        process.wait(60)
        assert time.monotonic() - asked < 15.0, "the exit waited for the server"
        server.start()
        assert sync(run_dir).status == "KILLED"
        done = duet(*command, timeout=600)
        assert done.returncode == 0, done.stderr
        assert sync(run_dir).status == "FINISHED"
        assert_mirrors(run_dir)
        assert run_of(run_dir).data.tags["restarts"] == "2"
    finally:
        server.kill()
