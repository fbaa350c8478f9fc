"""What tracking costs the training thread, beside what MLflow's own calls cost it.

Starts an `mlflow server` on sqlite of its own at 127.0.0.1. Exits with 1 when a target is missed.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.entities import Metric

from pretrain.run.journal import Journal
from pretrain.tracking.follower import Tracker, assign
from pretrain.tracking.mlflow_store import connect
from pretrain.tracking.mlflow_sync import Mirror

METRICS = {f"loss/metric_{i:02d}": 1.0 / (i + 1) for i in range(20)}
STEPS_A_BLOCK = 20
BLOCKS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as uri:
        costs = cost_of_a_step(Path(folder), uri)
        off, dead = step_with_a_dead_server(Path(folder))
    rows = [
        compare("journal with the mirror on", costs["journal"], "async MLflow", costs["async MLflow"], 0.5),
        compare("journal with the mirror on", costs["journal"], "log_metrics", costs["log_metrics"], 0.5),
        compare("training step with a dead server", dead, "tracking off", off, 1.05),
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at most |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.3f} | {row['target']} |")
    return int(any(row["ratio"] > row["target"] for row in rows))


def compare(ours: str, ms: float, other: str, other_ms: float, target: float) -> dict[str, Any]:
    return {"name": f"{ours} ({ms:.3f} ms) / {other} ({other_ms:.3f} ms)", "ratio": ms / other_ms, "target": target}


def cost_of_a_step(folder: Path, uri: str) -> dict[str, float]:
    """Milliseconds that a step's 20 metrics cost the calling thread: blocks of the three ways in turn, medians."""
    client = connect(uri)
    experiment = client.create_experiment("by hand")
    synchronous, asynchronous = (client.create_run(experiment).info.run_id for _ in range(2))
    mlflow.set_tracking_uri(uri)
    run_dir = folder / "run"
    run_dir.mkdir()
    journal = Journal(run_dir / "metrics.jsonl", 1)
    journal.event("start", resumed_from=None)
    assign(run_dir, uri=uri, experiment="duet", run_name="run")
    tracker = Tracker(partial(Mirror, run_dir), print)
    tracker.start()

    def log_async(step: int) -> None:  # the cheapest of MLflow's ways; `mlflow.log_metrics` takes longer for the same
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, step) for name, value in METRICS.items()]
        client.log_batch(asynchronous, metrics=metrics, synchronous=False)

    ways: dict[str, Callable[[int], object]] = {
        "journal": lambda step: journal.metrics(step, METRICS),
        "async MLflow": log_async,
        "log_metrics": lambda step: mlflow.log_metrics(METRICS, step, run_id=synchronous),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(BLOCKS):
        for name, way in ways.items():
            for step in range(block * STEPS_A_BLOCK, (block + 1) * STEPS_A_BLOCK):
                since = time.perf_counter()
                way(step)
                taken[name].append(1e3 * (time.perf_counter() - since))
    assert tracker.close(60.0), "the mirror was running"
    return {name: statistics.median(times) for name, times in taken.items()}


def step_with_a_dead_server(folder: Path) -> tuple[float, float]:
    """Milliseconds of a small training step, medians of interleaved blocks: tracking off, and on with nobody there."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(64, 256)

    def block(journal: Journal, first: int) -> Iterator[float]:
        for step in range(first, first + STEPS_A_BLOCK):
            since = time.perf_counter()
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            journal.metrics(step, METRICS | {"loss/train": loss.item()})
            yield 1e3 * (time.perf_counter() - since)

    dead_uri = f"http://127.0.0.1:{free_port()}"
    taken: dict[str, list[float]] = {"off": [], "dead": []}
    for number in range(BLOCKS):
        for mode, times in taken.items():
            run_dir = folder / f"{mode}-{number}"
            run_dir.mkdir()
            journal = Journal(run_dir / "metrics.jsonl", 1)
            journal.event("start", resumed_from=None)
            if mode == "dead":
                assign(run_dir, uri=dead_uri, experiment="duet", run_name=mode)
                tracker = Tracker(partial(Mirror, run_dir), lambda text: None)
                tracker.start()
            for first in range(0, 10 * STEPS_A_BLOCK, STEPS_A_BLOCK):
                times.extend(block(journal, first))
            if mode == "dead":
                assert not tracker.close(60.0), "nobody is there"
            journal.close()
    return statistics.median(taken["off"]), statistics.median(taken["dead"])


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """The URI of an `mlflow server` that answers; it is ended at the end."""
    store, port = f"sqlite:///{folder}/mlflow.db", free_port()
    connect(store)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        until_it_answers(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def until_it_answers(process: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the server did not start"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, "the server did not answer"
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
