"""MLflow fails in every way it can: training never waits for it, and in the end it has all of the journal, once."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from pretrain.tracking.follower import sync
from tests.faults.tracked import Gate, Server, Writer, assert_mirrors, run_of, until
from tests.ports import free_port
from tests.pretrain.tracking.test_tracking_store import Run

FAULTS = ("500", "403", "wrong port", "hung")
TOKEN = "a-token-nobody-may-read"
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
"""A call waits for its answer for longer than any end may: who waits for the call is noticed."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process's own calls: a busy server is none that failed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow") / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def ended(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Writer, Gate]]]:
    """One run for each fault, all at once, each from start to end behind it."""
    runs = {}
    for fault in FAULTS:
        gate = Gate(fault, server.port)
        environment = {"MLFLOW_TRACKING_TOKEN": TOKEN}
        if fault == "hung":
            environment |= PATIENT
        writer = Writer(tmp_path_factory.mktemp("runs") / "a", gate.uri, environment=environment)
        runs[fault] = writer, gate
    for writer, gate in runs.values():
        until(gate.asked.is_set)
        writer.tell("steps 1 300")
        writer.tell("system n1 1 20")
    yield runs
    for _, gate in runs.values():
        gate.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_behind_a_fault_ends_in_time_and_is_synced_later(
    fault: str, ended: dict[str, tuple[Writer, Gate]], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, gate = ended[fault]
    if fault == "hung":
        # The mirror waits for its answer until the gate opens, which is after these are written: so training needs
        # no lock that the mirror holds across a call.
        assert writer.tell("steps 301 1300") == {"done": "steps 301 1300"}
        assert gate.fault
    else:
        until(writer.warnings)
    assert not writer.end(timeout=2.0)
    with monkeypatch.context() as short, pytest.raises(RunError, match="nothing is lost"):
        short.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        sync(writer.run_dir)
    gate.open()
    assert sync(writer.run_dir).status == "FINISHED"
    assert assert_mirrors(writer.run_dir) > 1500
    said = writer.warnings()
    assert len(said) <= 1, "an outage is said once, however often it was tried"
    assert all("is tried again" in text for text in said)
    if fault != "wrong port":
        assert TOKEN.encode() in b"".join(gate.requests), "the token of the environment was used"
    for file in writer.run_dir.rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file


def test_a_server_killed_and_started_again_and_then_stopped(server: Server, tmp_path: Path) -> None:
    """In the middle of a run, with nodes whose metrics appear late; and SIGSTOP up to the end of the run."""
    run_dir = tmp_path / "a"
    (run_dir / "code").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("a: 1\n")
    writer = Writer(run_dir, server.uri, environment=PATIENT)
    writer.tell("system n1 1 10")
    writer.tell("steps 1 200")
    writer.tell("shipped")
    server.kill()
    writer.tell("steps 201 700")
    until(writer.warnings)
    server.start()
    until(lambda: len(writer.warnings()) == 2)
    assert [("is tried again" in text, "is back" in text) for text in writer.warnings()] == [
        (True, False),
        (False, True),
    ]
    writer.tell("system n2.example 1 30")
    writer.tell("shipped")
    assert run_of(run_dir).info.status == "RUNNING"
    assert_mirrors(run_dir)

    server.signal(signal.SIGSTOP)
    writer.tell("steps 701 900")
    writer.tell("system n1 11 20")
    assert not writer.end("KILLED", timeout=2.0)
    server.signal(signal.SIGCONT)
    server.wait()
    assert sync(run_dir).status == "KILLED"
    assert_mirrors(run_dir)
    assert {"usage/n1.load", "usage/n2.example.load"} <= set(run_of(run_dir).data.metrics)


def test_a_server_that_is_never_there(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a", f"http://127.0.0.1:{free_port()}")
    writer.tell("steps 1 300")
    until(writer.warnings)
    assert not writer.end(timeout=10.0)
    with pytest.raises(RunError, match="nothing is lost"):
        sync(tmp_path / "a")


def test_a_server_slower_than_the_time_a_call_has(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes longer than the first timeout; and it loses its store on the way."""
    gate = Gate(None, server.port, slow=b"log-batch", seconds=1.3)
    run = Run(tmp_path / "a", gate.uri).steps(20).end()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    assert sync(run.path).num_metrics == 20 * 3
    gate.close()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    run = Run(tmp_path / "b", server.uri).steps(20).end()
    sync(run.path)
    server.kill()
    server.lose_store()
    server.start()
    assert sync(run.path).num_metrics == 20 * 3
    assert_mirrors(run.path)
