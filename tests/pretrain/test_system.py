"""Samples of the machines, by a thread that never stands in the way."""

import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain import system
from pretrain.journal import read
from pretrain.system import SystemSampler, journal_path, node_name


def sample_for(seconds: float, logs: Path, attempt: int = 1, active: bool = True) -> list[str]:
    warnings: list[str] = []
    with SystemSampler(logs, attempt, step=5, active=active, warn=warnings.append) as sampler:
        time.sleep(seconds)
        sampler.step = 7
    return warnings


def test_samples_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    began = time.monotonic()
    assert sample_for(0.5, tmp_path / "logs") == []
    assert time.monotonic() - began < 3, "it ends at once, not after its interval"
    first, last = read(journal_path(tmp_path / "logs", node_name()))
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


def test_samples_keep_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SECONDS", 0.05)
    sample_for(0.6, tmp_path)
    assert len(list(read(journal_path(tmp_path, node_name())))) >= 4


def test_traffic_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that rises by 1 MiB a reading, since a test machine may have no network at all."""
    monkeypatch.setattr(system, "SECONDS", 0.1)
    readings = iter(range(1, 1000))
    monkeypatch.setattr(system, "_network_bytes", lambda: next(readings) << 20)
    sample_for(0.5, tmp_path)
    rates = [r.metrics[f"system/{node_name()}.net_mib_s"] for r in read(journal_path(tmp_path, node_name()))]
    assert rates[0] == pytest.approx(10, rel=0.3)


def test_a_later_attempt_appends(tmp_path: Path) -> None:
    for attempt in (1, 2):
        sample_for(0.2, tmp_path, attempt)
    assert [r.attempt for r in read(journal_path(tmp_path, node_name()))] == [1, 1, 2, 2]


def test_other_ranks_of_a_node_write_nothing(tmp_path: Path) -> None:
    sample_for(0.2, tmp_path / "logs", active=False)
    assert not (tmp_path / "logs").exists()


def test_a_disk_that_fails_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    [warning] = sample_for(0.2, tmp_path / "logs")
    assert re.match(r"system metrics of \S+ are incomplete: FileExistsError: ", warning)


def test_a_sample_that_fails_is_told_once_and_the_next_ones_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "SECONDS", 0.05)
    calls = 0
    original = psutil.disk_usage

    def failing(path: str) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise OSError("stale file handle")
        return original(path)

    monkeypatch.setattr(psutil, "disk_usage", failing)
    [warning] = sample_for(0.5, tmp_path)
    assert "stale file handle" in warning
    assert len(list(read(journal_path(tmp_path, node_name())))) == calls - 2


def test_nobody_waits_long_for_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "JOIN_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(system, "_open_gpus", lambda: release.wait(30) and [])
    began = time.monotonic()
    sample_for(0.0, tmp_path)
    assert time.monotonic() - began < 2
    release.set()


@pytest.mark.parametrize(
    ("host", "node"), [("gpu-012.cluster.example", "gpu-012"), ("n_1", "n_1"), ("ké%(1)", "k---1-"), ("a b/c", "a-b-c")]
)
def test_node_names_are_legal_in_metric_names(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert node_name() == node


def test_a_run_of_two_ranks_has_one_writer_on_the_node(
    ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks have the host name in common; two writers would show as twice the samples."""
    from tests.distributed.test_metrics import arguments
    from tests.runs import ROOT, duet

    data = tmp_path / "data"
    assert not duet(
        "data", "build", "data/characters", f"data.sources.text.paths=[{ROOT / 'LICENSE'}]", f"data.path={data}"
    ).returncode
    ranks("tests.distributed.cases:train_run", 2, args=arguments(data, tmp_path / "run"))
    [file] = (tmp_path / "run" / "logs").glob("system-*.jsonl")
    steps = [r.step for r in read(file)]
    assert len(steps) in (1, 2), "at the start, if the run was long enough, and at the end"
    assert steps[-1] == 12
