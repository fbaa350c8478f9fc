"""What the proofs of tracking share: a run in a process, a real `mlflow server`, a faulty way to it, the comparison."""

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pretrain.tracking.mlflow_state import State, default_uri
from pretrain.tracking.mlflow_store import connect
from tests import warm
from tests.ports import free_port
from tests.runs import ROOT, new_store

ANSWERS = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\nOops",
    "403": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nNo",
    "wrong port": b"SSH-2.0-OpenSSH_9.6\r\n",
}
RENAMED = {"time": "speed", "data": "training data", "health": "training health", "system": "usage"}
RENAMED |= {"gate": "training masks", "penalty": "training masks"}
MASKS = {
    *("gate/density", "gate/val_density", "gate/mask_mean", "gate/flips", "gate/multiplier", "gate/mask_slope"),
    *("penalty/entropy", "penalty/l0", "penalty/blocks"),
}
TWICE = ("health/restarts", "data/samples_seen", "time/tokens_per_second_per_device", "system/host_memory_gib")
"""Of a run of one rank without a GPU; with several ranks the third is no double."""


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


class Writer:
    """`tests/faults/writer.py` in a process of its own."""

    def __init__(
        self,
        run_dir: Path,
        uri: str | None = None,
        *,
        lr: float = 1e-3,
        mode: str = "online",
        resumed_from: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = run_dir
        arguments = json.dumps([str(run_dir), {"optimizer": {"lr": lr}, "a": None}, uri, mode, resumed_from])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self.process = subprocess.Popen(
            warm.command("tests.faults.writer", arguments), cwd=ROOT, env=clean | dict(environment or {}),
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()

    def tell(self, command: str) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.send(command)
        return self._answer()

    def send(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def die(self) -> None:
        """SIGKILL in the middle of a line."""
        self.send("die")
        assert self.process.wait(30) == -signal.SIGKILL

    def end(self, status: str = "FINISHED", timeout: float = 60.0) -> bool:
        """The end of the run: in time, and only the mirror used the network. Returns whether MLflow has all."""
        since = time.monotonic()
        result = self.tell(f"end {status} {timeout}")
        assert self.process.wait(30) == 0
        assert time.monotonic() - since < timeout + 60.0, "the exit waited for the server"
        assert result["callers"], "the proof sees calls at all"
        for event, threads in result["callers"].items():
            assert threads == ["mirror"], event
        return bool(result["complete"])

    def warnings(self) -> list[str]:
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [line["text"] for line in map(json.loads, lines) if line["kind"] == "warning"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], 90.0)
        if not ready:
            self.process.kill()  # it hears nothing more
            raise AssertionError("the training thread waits for something")
        line = self.process.stdout.readline()
        assert line, f"the writer ended with code {self.process.wait(30)}"
        return dict(json.loads(line))


class Server:
    """`mlflow server` on sqlite, on a port of its own of 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        new_store(folder / "mlflow.db")

    def start(self) -> None:
        """Returns when it answers."""
        store = f"sqlite:///{self._folder}/mlflow.db"
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", store, "--artifacts-destination", f"{self._folder}/artifacts",
        ]  # fmt: skip
        with open(self._folder / "log", "ab") as log:
            self._process = process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        self.wait()
        assert process.poll() is None, (self._folder / "log").read_text()

    def wait(self) -> None:
        """Until it answers, or is gone."""
        assert self._process
        process = self._process
        until(lambda: process.poll() is not None or self._answers())

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        assert self._process
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def lose_store(self) -> None:
        """All that was in it."""
        (self._folder / "mlflow.db").unlink()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Gate:
    """The way to a server, which has a fault (a key of ANSWERS, `hung`, or none) until it is opened.

    What is sent to `slow` (a part of a path) takes `seconds` longer, opened or not.

    `requests` holds the first bytes of what was asked while it was closed; `asked` is set by the first.
    """

    def __init__(self, fault: str | None, target: int, slow: bytes = b"", seconds: float = 0.0) -> None:
        self.fault = fault
        self._slow = slow
        self._seconds = seconds
        self.requests: list[bytes] = []
        self.asked = threading.Event()
        self._target = target
        self._opened = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def open(self) -> None:
        """From now on the server is reached; what hung is closed."""
        self.fault = None
        self._opened.set()

    def close(self) -> None:
        self.open()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if fault := self.fault:
                self.requests.append(client.recv(65536))
                self.asked.set()
                if fault == "hung":
                    self._opened.wait()
                else:
                    client.sendall(ANSWERS[fault])
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                back = threading.Thread(target=_pipe, args=(server, client), daemon=True)
                back.start()
                _pipe(client, server, self._hold)
                back.join()

    def _hold(self, data: bytes) -> bytes:
        """Wait, and have the connection used once: the server would close it in the meantime."""
        if self._seconds and data.startswith((b"GET ", b"POST ", b"PUT ")):
            time.sleep(self._seconds if self._slow in data.split(b"\r\n", 1)[0] else 0)
            return data.replace(b"Connection: keep-alive", b"Connection: close", 1)
        return data


def _pipe(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes] = lambda data: data) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(change(data))
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the other side has gone, which is its right


def run_of(run_dir: Path) -> Any:
    """The run in MLflow."""
    state = State.load(run_dir)
    assert state and state.run_id
    return connect(state.uri or default_uri(run_dir)).get_run(state.run_id)


def assert_mirrors(run_dir: Path, all_masks: bool = False) -> int:
    """Every finite point that MLflow is to have of the journal's files is there once, and nothing else is. Returns how
    many points."""
    expected: dict[str, Counter[tuple[int, int, float]]] = {}
    journal_names: dict[str, str] = {}
    for file in (run_dir / "metrics.jsonl", *sorted((run_dir / "logs").glob("system-*.jsonl"))):
        text = file.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            record = json.loads(line)
            if record["kind"] != "metrics":
                continue
            point = (record.get("step") or 0, record["time"])
            bad = 0
            for name, given in _of_record(record["metrics"], all_masks).items():
                section, _, rest = name.partition("/")
                shown = f"{RENAMED.get(section, section)}/{rest.replace('/', '.')}"
                assert journal_names.setdefault(shown, name) == name, "two metrics became one"
                value = float(given)
                if math.isfinite(value):
                    expected.setdefault(shown, Counter())[*point, value] += 1
                else:
                    bad += 1
            expected.setdefault("training health/attempt", Counter())[*point, float(record["attempt"])] = 1
            if bad:
                expected.setdefault("training health/nonfinite_values", Counter())[*point, float(bad)] = 1
    state, run = State.load(run_dir), run_of(run_dir)
    assert state
    client = connect(state.uri or default_uri(run_dir))
    assert set(run.data.metrics) == set(expected)
    for name, points in expected.items():
        history = client.get_metric_history(run.info.run_id, name)  # follows the pages to the last one
        assert Counter((m.step, m.timestamp, m.value) for m in history) == points, name
    return sum(points.total() for points in expected.values())


def _of_record(metrics: dict[str, Any], all_masks: bool) -> dict[str, Any]:
    """By their names in the journal, with what is made of several."""
    layers: dict[str, list[float]] = {}
    for name, given in metrics.items():
        if name.count("/") == 3:  # gate / what / site / layer
            _, what, site, _ = name.split("/")
            layers.setdefault(f"gate/{what}_{site}", []).append(float(given))
    twice = {*TWICE} - ({TWICE[2]} if "time/rank_spread" in metrics else set())
    if not any(name.startswith("penalty/") for name in metrics):
        twice.add("loss/total")
    if "gate/mask_mean" in metrics:
        twice.add("penalty/l1")
    found = {
        name: given
        for name, given in metrics.items()
        if name.count("/") < 3 and name not in twice
        if all_masks or name in MASKS or not name.startswith(("gate/", "penalty/"))
    }
    if all_masks:
        for site, values in layers.items():
            for word, summary in (("min", min), ("max", max), ("mean", fmean)):
                found[f"{site}_{word}"] = str(summary(values)) if all(map(math.isfinite, values)) else "nan"
    if "loss/val" in metrics:
        found["loss/val_perplexity"] = math.exp(float(metrics["loss/val"]))
    return found
