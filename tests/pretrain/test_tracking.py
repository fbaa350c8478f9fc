"""MLflow, late or away: training never waits for it, and in the end it has all of the journal, once."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, RunError
from pretrain import tracking
from pretrain.journal import Journal, read
from pretrain.tracking import SHIPPED, Tracker, check_uri, default_uri, sync
from tests.conftest import ROOT

TRAIN = """
import json, os, pathlib, signal, sys, time
from pretrain.journal import Journal
from pretrain.tracking import Tracker, default_uri
from tests.pretrain.test_tracking import until, values
run_dir, attempt, first, last, lr, kill, uri, timeout = json.loads(sys.argv[1])
run_dir = pathlib.Path(run_dir)
run_dir.mkdir(exist_ok=True, parents=True)
journal = Journal(run_dir / "metrics.jsonl", attempt)
journal.event("start", resumed_from=first or None, world_size=1)
tracker = Tracker(
    run_dir, uri=uri or default_uri(run_dir), experiment="duet", run_name="run", params={"optimizer": {"lr": lr}},
    tags={"git/commit": "abc"}, warn=lambda text: print("WARNING", text, flush=True),
)
tracker.start()
longest = 0.0
for step in range(first + 1, last + 1):
    since = time.perf_counter()
    journal.metrics(step, values(step, attempt))
    longest = max(longest, time.perf_counter() - since)
    if step % 10 == 0:
        journal.event("checkpoint", step=step, path=f"checkpoints/step-{step}")
    if kill and step == last // 2:
        until(lambda: json.loads((run_dir / "tracking.json").read_text())["offset"] > 0, 60)
if kill:
    os.kill(os.getpid(), signal.SIGKILL)
journal.event("end", status="FINISHED", reason="all steps done")
journal.close()
print(json.dumps({"longest": longest, "complete": tracker.close(timeout), "closed": time.time()}), flush=True)
"""


def values(step: int, attempt: int) -> dict[str, float]:
    return {
        "loss/train": 5.0 / step + attempt,
        "optim/grad_norm": math.inf if step == 3 else 1.0,
        "gate/density/enc_ff/00": 0.5,
    }


def until(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def train(
    run_dir: Path,
    attempt: int,
    first: int,
    last: int,
    *,
    lr: float = 1e-3,
    kill: bool = False,
    uri: str | None = None,
    timeout: float = 30.0,
) -> "subprocess.Popen[str]":
    arguments = json.dumps([str(run_dir), attempt, first, last, lr, kill, uri, timeout])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def client(uri: str) -> Any:
    return tracking._connect(uri)


def run_of(run_dir: Path, uri: str) -> Any:
    return client(uri).get_run(json.loads((run_dir / "tracking.json").read_text())["run_id"])


def assert_mirrors(run_dir: Path, uri: str) -> None:
    """Every finite point of the journal is in MLflow once, and nothing else is."""
    expected: dict[str, Counter[tuple[int, int, float]]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        for name, value in record.metrics.items():
            if name.count("/") == 1 and math.isfinite(value):
                expected.setdefault(name, Counter())[(record.step or 0, record.time, value)] += 1
            elif name.count("/") == 1:
                expected.setdefault("health/nonfinite", Counter())[(record.step or 0, record.time, 1.0)] += 1
    run = run_of(run_dir, uri)
    assert set(run.data.metrics) == set(expected)
    for name, points in expected.items():
        history = client(uri).get_metric_history(run.info.run_id, name)
        assert Counter((m.step, m.timestamp, m.value) for m in history) == points


def test_killed_and_resumed_is_one_run_with_every_point_once(tmp_path: Path) -> None:
    run_dir, neighbour = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    uri = default_uri(run_dir)
    killed, beside = train(run_dir, 1, 0, 60, kill=True), train(neighbour, 1, 0, 20)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    output, _ = beside.communicate()
    assert json.loads(output)["complete"], "two runs made the new store at once"
    assert not list(run_dir.parent.glob(".*.tmp"))
    assert_mirrors(neighbour, uri)
    assert run_of(run_dir, uri).info.status == "RUNNING"
    second = train(run_dir, 2, 40, 80, lr=5e-4)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert len(output.splitlines()) == 1, "MLflow and its migrations say nothing on the terminal"
    assert json.loads(output)["complete"]

    assert_mirrors(run_dir, uri)
    run = run_of(run_dir, uri)
    assert run.info.experiment_id == run_of(neighbour, uri).info.experiment_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.001"}
    tags = run.data.tags
    assert tags["drift/optimizer.lr"] == "0.001 → 0.0005"
    assert (tags["restarts"], tags["git/commit"]) == ("1", "abc")
    assert tags["checkpoint/last"] == "step 80: checkpoints/step-80"
    assert tags["mlflow.note.content"].startswith("Finished at step 80, resumed once: training loss 6.0000 → 2.0625")

    # A crash after the server said yes and before that was on disk: the same run, nothing twice.
    path = run_dir / "tracking.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"offset": 0, "run_id": None, "pending": True}))
    (run_dir / "report.html").write_text("a report")
    synced = sync(run_dir)
    assert synced.run_id == state["run_id"]
    assert synced.num_metrics > 0
    assert_mirrors(run_dir, uri)
    assert run_of(run_dir, uri).info.status == "FINISHED"
    assert [f.path for f in client(uri).list_artifacts(synced.run_id)] == ["report.html"]
    assert (tmp_path / "runs" / "mlartifacts").is_dir()
    assert sync(run_dir).num_metrics == 0


@pytest.fixture
def port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path, port: int) -> Iterator[Callable[[], int]]:
    """Starts `mlflow server` when called, and returns its process group once it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        folder = tmp_path / "server"
        folder.mkdir()
        client(f"sqlite:///{folder}/mlflow.db")
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
        ]  # fmt: skip
        with open(tmp_path / "server.log", "wb") as log:
            process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        started.append(process)
        until(lambda: process.poll() is not None or _answers(port), 60)
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        return process.pid

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_server_that_comes_late_and_one_that_hangs(
    tmp_path: Path, port: int, server: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_SECONDS", 0.2)
    uri = f"http://127.0.0.1:{port}"
    late = tmp_path / "late"
    late.mkdir()
    (late / "config.yaml").write_text("a: 1\n")
    journal = Journal(late / "metrics.jsonl", 1)
    warnings: list[str] = []
    tracker = Tracker(
        late, uri=uri, experiment="duet", run_name="late", params={"a": None}, tags={}, warn=warnings.append
    )
    journal.event("start", resumed_from=None)
    tracker.start()
    for step in range(1, 1500):
        journal.metrics(step, values(step, 1))
    until(lambda: warnings, 30)
    assert "is tried again" in warnings[0]

    group = server()
    until(lambda: len(warnings) == 2, 30)
    assert "is back" in warnings[1]
    journal.event("end", status="KILLED", reason="signal 15")
    assert tracker.close(30.0)
    assert len(warnings) == 2, "an outage is said once, however often it was tried"
    assert_mirrors(late, uri)
    run = run_of(late, uri)
    assert run.info.status == "KILLED"
    assert [f.path for f in client(uri).list_artifacts(run.info.run_id)] == ["config.yaml"]

    os.killpg(group, signal.SIGSTOP)
    hung = tmp_path / "hung"
    process = train(hung, 1, 0, 500, uri=uri, timeout=2.0)
    output, _ = process.communicate(timeout=30)
    exited = time.time()
    assert process.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert not result["complete"]
    assert result["longest"] < 2.0, "the training thread waited for the server"
    assert exited - result["closed"] < 3.0, "the exit waited for the server"
    os.killpg(group, signal.SIGCONT)
    until(lambda: _answers(port), 30)
    assert sync(hung).uri == uri
    assert_mirrors(hung, uri)
    assert run_of(hung, uri).info.status == "FINISHED"


def test_a_server_that_is_never_there(tmp_path: Path, port: int) -> None:
    run_dir = tmp_path / "a"
    process = train(run_dir, 1, 0, 100, uri=f"http://127.0.0.1:{port}", timeout=10.0)
    output, _ = process.communicate(timeout=30)
    warning, result = output.splitlines()
    assert warning.startswith("WARNING")
    assert "is tried again" in warning
    assert not json.loads(result)["complete"]
    assert time.time() - json.loads(result)["closed"] < 3.0
    with pytest.raises(RunError, match="nothing is lost"):
        sync(run_dir)


def test_a_run_folder_that_moved_takes_the_default_store_beside_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "old" / "a"
    run_dir.mkdir(parents=True)
    Tracker(run_dir, uri=default_uri(run_dir), experiment="e", run_name="a", params={}, tags={}, warn=print)
    assert json.loads((run_dir / "tracking.json").read_text())["uri"] is None
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new" / "a"
    assert tracking._Mirror(moved, tracking._load_state(moved)).uri == f"sqlite:///{tmp_path}/new/mlflow.db"


def test_another_server_gets_a_run_of_its_own_from_the_start(tmp_path: Path) -> None:
    def state(uri: str) -> dict[str, Any]:
        Tracker(tmp_path, uri=uri, experiment="e", run_name="a", params={}, tags={}, warn=print)
        return json.loads((tmp_path / "tracking.json").read_text())

    first = state("http://one:5000")
    path = tmp_path / "tracking.json"
    path.write_text(json.dumps(first | {"run_id": "r1", "offset": 7}))
    assert state("http://one:5000")["run_id"] == "r1"
    other = state("http://two:5000")
    assert (other["run_id"], other["offset"]) == (None, 0)
    assert other["key"] != first["key"]


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "./mlruns", "http://", "ftp://host/x", "", "https://me:secret@host/", "me:secret@host"]
)
def test_uris_of_no_use_are_refused_without_telling_the_password(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri") as refused:
        check_uri(uri)
    assert "secret" not in str(refused.value)


def test_an_untracked_run_and_a_newer_state(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a tracked run"):
        sync(tmp_path)
    (tmp_path / "tracking.json").write_text('{"format": 2}')
    with pytest.raises(RunError, match="format 2 is not known"):
        sync(tmp_path)


def test_names_that_are_shipped() -> None:
    shipped = ["loss/train", "loss", "time/step_ms", "gate/val_density"]
    kept = ["gate/density/enc_ff/00", "a//b", "/a", "a/", "a%", "../a", "a/.b", ""]
    assert [name for name in shipped + kept if SHIPPED.fullmatch(name)] == shipped
