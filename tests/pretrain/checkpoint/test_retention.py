"""Which checkpoints stay."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint import retention
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.retention import prune, reasons
from pretrain.run.checkpoint_folder import complete, hold, step_of, step_path


def make(root: Path, step: int, loss: float | None = None) -> Path:
    path = step_path(root, step)
    path.mkdir(parents=True)
    manifest = CheckpointManifest(
        step=step,
        optimizer_steps=step,
        world_size=0,
        zero_stage=1,
        shapes={},
        states={},
        shards=[],
        state={},
        validation_loss=loss,
    )
    (path / "manifest.json").write_text(manifest.sealed())
    return path


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*"))


def test_the_newest_each_kth_and_the_best(tmp_path: Path) -> None:
    losses = {1: None, 10: None, 20: 3.0, 30: 2.0, 40: float("nan"), 50: 2.5, 60: None, 70: None}
    for step, loss in losses.items():
        make(tmp_path, step, loss)
    why = {step_of(path): reason for path, reason in reasons(tmp_path, keep=2, every=20).items()}
    assert why == {
        70: ["newest"],
        60: ["among the newest 2", "every 20"],
        50: [],
        40: ["every 20"],
        30: ["best"],
        20: ["every 20"],
        10: [],
        1: [],
    }
    assert [step_of(path) for path in prune(tmp_path, 2, 20, dry_run=True)] == [1, 10, 50]
    assert len(steps(tmp_path)) == 8
    prune(tmp_path, 2, 20)
    assert steps(tmp_path) == [20, 30, 40, 60, 70]


def test_what_another_run_needs_stays_as_long_as_it_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path / "base", step)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "run.json").touch()
    for _ in range(2):
        hold(step_path(tmp_path / "base", 1), tmp_path / "tuned")
    make(tmp_path / "other", 1)
    hold(step_path(tmp_path / "other", 1), tmp_path / ("x" * 256))  # whether it is there, the system does not say
    make(tmp_path / "other", 2)
    assert prune(tmp_path / "other", 1, None) == []
    prune(tmp_path / "base", 1, None)
    assert steps(tmp_path / "base") == [1, 3]
    assert reasons(tmp_path / "base", 1, None)[step_path(tmp_path / "base", 1)] == [f"needed by {tmp_path / 'tuned'}"]
    (tmp_path / "tuned" / "run.json").unlink()
    prune(tmp_path / "base", 1, None)
    assert steps(tmp_path / "base") == [3]


def test_what_another_run_begins_with_stays_until_it_has_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path / "base", step)
    new, base = tmp_path / "new", step_path(tmp_path / "base", 1)
    make(new / "checkpoints", 5)
    (new / "run.json").touch()
    (step_path(new / "checkpoints", 5) / "manifest.json").rename(tmp_path / "manifest.json")  # it is being saved
    hold(base, new, to_begin=True)
    prune(tmp_path / "base", 1, None)
    assert reasons(tmp_path / "base", 1, None)[base] == [f"needed by {new}"]
    hold(base, new)
    (tmp_path / "manifest.json").rename(step_path(new / "checkpoints", 5) / "manifest.json")
    assert reasons(tmp_path / "base", 1, None)[base] == [f"needed by {new}"], "its adapters change it"
    hold(step_path(tmp_path / "base", 2), new, to_begin=True)
    make(tmp_path / "base", 3)
    prune(tmp_path / "base", 1, None)
    assert steps(tmp_path / "base") == [1, 3]


def test_the_newest_whole_one_stays_when_newer_ones_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (step_path(tmp_path, 4) / "manifest.json").write_text("{")
    (step_path(tmp_path, 3) / "manifest.json").write_text('{"format": 99}')
    prune(tmp_path, 1, None)
    assert steps(tmp_path) == [2, 3, 4]


def test_what_interrupted_saves_left_goes_but_not_a_save_in_flight(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for step in (1, 3):
        (make(tmp_path, step) / "manifest.json").unlink()
    prune(tmp_path, 1, None)
    assert steps(tmp_path) == [2, 3]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    saves=st.lists(st.none() | st.floats(allow_infinity=False), min_size=1, max_size=12),
    keep=st.integers(1, 4),
    every=st.none() | st.integers(1, 5),
)
def test_pruning_after_each_save_keeps_what_it_should(
    tmp_path: Path, saves: list[float | None], keep: int, every: int | None
) -> None:
    root = tmp_path / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    for step, loss in enumerate(saves, 1):
        make(root, step, loss)
        prune(root, keep, every)
        expected = set(range(max(1, step - keep + 1), step + 1))
        expected |= {s for s in range(1, step + 1) if every and s % every == 0}
        known = [(value, -s) for s, value in enumerate(saves[:step], 1) if value is not None and value == value]
        assert expected | ({-min(known)[1]} if known else set()) == set(steps(root))
        assert step_of(complete(root)[0]) == step


def test_a_checkpoint_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention, "remove", refuse)
    with pytest.raises(CheckpointError, match="step-000000001: could not be removed"):
        prune(tmp_path, 1, None)
