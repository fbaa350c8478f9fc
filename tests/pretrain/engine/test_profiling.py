"""Traces of the steps one asks for, and of no others."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from pretrain.config.schema import load
from pretrain.engine.profiling import Profile
from pretrain.run.journal import read
from tests.distributed.test_metrics import arguments


def run(folder: Path, steps: tuple[int, int] | None, first: int, last: int) -> list[tuple[int, str]]:
    """Steps first..last, each a product of matrices as wide as the step's number."""
    written: list[tuple[int, str]] = []
    with Profile(steps, folder, torch.device("cpu"), lambda step, path: written.append((step, path.name))) as profile:
        for step in range(first, last + 1):
            profile.before(step)
            torch.ones(step, step) @ torch.ones(step, step)
            profile.after(step)
    return written


def products(trace: Path) -> int:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("first", "last", "traced", "name"),
    [
        (1, 9, 3, "trace-4.json.gz"),
        (5, 9, 2, "trace-5.json.gz"),  # resumed in between
        (1, 5, 2, "trace-4.json.gz"),  # stopped in between
    ],
)
def test_the_steps_asked_for_are_traced(tmp_path: Path, first: int, last: int, traced: int, name: str) -> None:
    step = int(name[6])
    assert run(tmp_path / "profile", (4, 6), first, last) == [(step, name)]
    assert products(tmp_path / "profile" / name) == traced
    assert [file.name for file in (tmp_path / "profile").iterdir()] == [name]


@pytest.mark.parametrize(("steps", "first"), [(None, 1), ((4, 6), 7)])
def test_nothing_is_traced_otherwise(tmp_path: Path, steps: tuple[int, int] | None, first: int) -> None:
    assert run(tmp_path / "profile", steps, first, 9) == []
    assert not (tmp_path / "profile").exists()


def test_a_run_writes_its_trace_and_says_so(
    ranks: Callable[..., list[Any]],
    dataset: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, run_dir, "profile.steps=[5,6]"))
    [event] = [r for r in read(run_dir / "metrics.jsonl") if r.kind == "profile"]
    assert (event.step, event.fields["path"]) == (5, "profile/trace-5.json.gz")
    assert products(run_dir / event.fields["path"]) > 0
    assert [file.name for file in (run_dir / "profile").iterdir()] == ["trace-5.json.gz"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[0,3]", r"profile: steps=\[0, 3\]: expected \[first, last\] with 1 <= first <= last"),
        ("[7,3]", r"expected \[first, last\] with 1 <= first <= last"),
        ("[3,2000]", r"profile.steps=\[3, 2000\] goes beyond train.steps=1000"),
        ("[3]", "profile.steps: expected 2 values"),
        ("3", "profile.steps"),
    ],
)
def test_a_range_that_cannot_be_is_an_error(steps: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([f"profile.steps={steps}"])


def test_a_range_is_read() -> None:
    assert load(["profile.steps=[3,4]"]).profile.steps == (3, 4)
    assert load([]).profile.steps is None
