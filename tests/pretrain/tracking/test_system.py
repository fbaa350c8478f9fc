"""Samples of the machines, by a thread that never stands in the way."""

import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pretrain.run.journal import Journal, Record, read
from pretrain.tracking import system_metrics
from pretrain.tracking.system_metrics import AllNodes, SystemSampler, journal_path, mirrored_files, node_name


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may let the thread stand still for seconds."""
    monkeypatch.setattr(system_metrics, "JOIN_SECONDS", 120.0)


def sample(
    logs: Path,
    until: Callable[[list[str]], object] = bool,
    attempt: int = 1,
    active: bool = True,
    of_nodes: int = 0,
) -> list[str]:
    """Sample until something is so, by default that there is a warning; it is asked with all warnings."""
    warnings: list[str] = []
    with SystemSampler(logs, attempt, step=5, active=active, warn=warnings.append, of_nodes=of_nodes) as sampler:
        end = time.monotonic() + 120
        while not until(warnings):
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.005)
        sampler.step = 7
    return warnings


def samples(logs: Path) -> list[Record]:
    path = journal_path(logs, node_name())
    return list(read(path)) if path.exists() else []


def test_samples_at_the_start_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS", 1e6)  # it ends at once, not after its interval
    assert sample(tmp_path / "logs", until=lambda _: samples(tmp_path / "logs")) == []
    first, last = samples(tmp_path / "logs")
    assert (first.step, last.step) == (5, 7)
    for record in (first, last):
        assert (record.kind, record.attempt) == ("metrics", 1)
        values = {name.removeprefix(f"system/{node_name()}."): value for name, value in record.metrics.items()}
        assert {"cpu_percent", "memory_gib", "disk_free_gib", "net_mib_s"} <= values.keys()
        assert all(math.isfinite(value) and value >= 0 for value in values.values())
        assert values["cpu_percent"] <= 100
        assert 0 < values["memory_gib"] < psutil.virtual_memory().total / 2**30
        assert values["disk_free_gib"] == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.05)
        assert ("gpu0_power_w" in values) == Path("/proc/driver/nvidia").exists()


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_samples_keep_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS", 0.05)
    assert sample(tmp_path, until=lambda _: len(samples(tmp_path)) >= 4) == []


def test_traffic_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that rises by 1 MiB a reading, since a test machine may have no network at all; 0.1 s go by between."""
    readings, seconds = iter(range(1, 1000)), iter(range(1, 1000))
    monkeypatch.setattr(system_metrics, "_network_bytes", lambda: next(readings) << 20)
    monkeypatch.setattr(system_metrics, "time", SimpleNamespace(monotonic=lambda: next(seconds) / 10))
    sample(tmp_path, until=lambda _: samples(tmp_path))
    assert [r.metrics[f"system/{node_name()}.net_mib_s"] for r in samples(tmp_path)] == pytest.approx([10, 10])


def test_a_later_attempt_appends(tmp_path: Path) -> None:
    def sampled(attempt: int) -> Callable[[list[str]], object]:
        return lambda _: [record for record in samples(tmp_path) if record.attempt == attempt]

    for attempt in (1, 2):
        sample(tmp_path, until=sampled(attempt), attempt=attempt)
    assert [r.attempt for r in samples(tmp_path)] == [1, 1, 2, 2]


def test_other_ranks_of_a_node_write_nothing(tmp_path: Path) -> None:
    sample(tmp_path / "logs", until=lambda _: "system-sampler" not in running(), active=False)
    assert not (tmp_path / "logs").exists()


def test_of_many_nodes_least_mean_and_greatest_are_told_with_the_nodes_they_are_of(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    nodes = {f"n{number}": Journal(journal_path(logs, f"n{number}"), 1) for number in range(9)}
    nodes["n0"].metrics(1, {"system/n0.memory_gib": 1e6})  # before
    all_nodes = AllNodes(logs, 2)
    for number, (node, journal) in enumerate(nodes.items()):
        for load in (99.0, 10.0 * number):  # the newest counts
            hot = {3: 50.0} if node == "n7" else {}
            gpus = {f"system/{node}.gpu{gpu}_temp_c": 40.0 + gpu + hot.get(gpu, 0) for gpu in range(4)}
            journal.metrics(5, {f"system/{node}.cpu_percent": load} | gpus)
    all_nodes.sum_up(6)
    nodes["n4"].metrics(6, {"system/n4.cpu_percent": 3.0})  # the others say nothing more
    all_nodes.sum_up(7)
    assert mirrored_files(tmp_path) == [logs / "nodes.jsonl"]
    first, second = read(logs / "nodes.jsonl")
    values = {name.removeprefix("system/nodes."): value for name, value in first.metrics.items()}
    cpu = {"cpu_percent_min": 0, "cpu_percent_mean": 40, "cpu_percent_max": 80}
    gpu = {"gpu_temp_c_min": 40, "gpu_temp_c_mean": pytest.approx(41.5 + 50 / 36), "gpu_temp_c_max": 93}
    assert values == {"heard": 9} | cpu | gpu
    where = first.fields["where"]
    assert (where["cpu_percent_min"], where["cpu_percent_max"], where["gpu_temp_c_max"]) == ("n0", "n8", "n7.gpu3")
    assert (second.metrics["system/nodes.heard"], second.metrics["system/nodes.cpu_percent_max"]) == (1, 3)
    assert (first.step, first.attempt, second.step) == (6, 2, 7)


@pytest.mark.parametrize(("before", "nodes", "summed_up"), [(False, 9, True), (True, 8, True), (False, 8, False)])
def test_samples_of_many_nodes_are_summed_up_and_of_few_that_were_many(
    tmp_path: Path, before: bool, nodes: int, summed_up: bool
) -> None:
    file = tmp_path / "nodes.jsonl"
    if before:
        file.touch()
    sample(tmp_path, until=lambda _: samples(tmp_path), of_nodes=nodes)
    found = [record.metrics["system/nodes.cpu_percent_mean"] for record in read(file)] if file.exists() else []
    own = [record.metrics[f"system/{node_name()}.cpu_percent"] for record in samples(tmp_path)]
    assert found == (own if summed_up else [])


def test_a_disk_that_fails_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    [warning] = sample(tmp_path / "logs")
    assert re.match(r"system metrics of \S+ are incomplete: FileExistsError: ", warning)


def test_a_sample_that_fails_is_told_once_and_the_next_ones_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS", 0.05)
    calls = 0
    original = psutil.disk_usage

    def failing(path: str) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise OSError("stale file handle")
        return original(path)

    monkeypatch.setattr(psutil, "disk_usage", failing)
    [warning] = sample(tmp_path, until=lambda _: calls >= 5)
    assert "stale file handle" in warning
    assert len(samples(tmp_path)) == calls - 2


def test_nobody_waits_long_for_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "JOIN_SECONDS", 0.2)
    hangs, release = threading.Event(), threading.Event()

    def hang() -> list[Any]:
        hangs.set()
        release.wait(600)
        return []

    monkeypatch.setattr(system_metrics, "_open_gpus", hang)
    try:
        sample(tmp_path, until=lambda _: hangs.is_set())
        assert "system-sampler" in running(), "it was left behind"
    finally:
        release.set()


@pytest.mark.parametrize(
    ("host", "node"), [("gpu-012.cluster.example", "gpu-012"), ("n_1", "n_1"), ("ké%(1)", "k---1-"), ("a b/c", "a-b-c")]
)
def test_node_names_are_legal_in_metric_names(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert node_name() == node


def test_a_run_of_two_ranks_has_one_writer_on_the_node(
    ranks: Callable[..., list[Any]], dataset: Path, tmp_path: Path
) -> None:
    """Both ranks have the host name in common; two writers would show as twice the samples."""
    from tests.distributed.test_metrics import arguments

    ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, tmp_path / "run"))
    [file] = (tmp_path / "run" / "logs").glob("system-*.jsonl")
    found = list(read(file))
    pauses = [(later.time - earlier.time) / 1e3 for earlier, later in pairwise(found)]
    assert all(pause > 0.9 * system_metrics.SECONDS for pause in pauses[:-1]), "between all but the last, at the end"
    assert found[-1].step == 12
