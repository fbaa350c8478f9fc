"""Checkpoints: exact at any stage and number of ranks, and never torn."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RanksFailed

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.cases:"
SOURCES = [
    (0, "fp32", 2),
    (1, "fp32", 2),
    (2, "fp32", 1),
    (3, "fp32", 2),
    (1, "bf16", 2),
    (2, "bf16", 2),
    (3, "bf16", 2),
]


@pytest.mark.parametrize(("stage", "precision", "world"), SOURCES)
def test_parameters_and_moments_reach_every_stage_and_world_size_bit_for_bit(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, world: int
) -> None:
    root = str(tmp_path)
    [saved, *_] = ranks(
        f"{CASES}train_and_save", world, root=root, stage=stage, precision=precision, save_at=3, until=6
    )
    for other_stage, other_world in ((0, 1), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2)):
        if other_stage == 0 and precision == "bf16":
            continue
        [resumed, *_] = ranks(f"{CASES}resume", other_world, root=root, stage=other_stage, precision=precision, until=6)
        assert resumed["step"] == 3
        assert resumed["loaded"] == saved["saved"], f"to ZeRO {other_stage} on {other_world}"
        if (other_stage, other_world) == (stage, world):
            assert resumed["losses"] == saved["losses"][3:]
            assert resumed["final"] == saved["final"]
        elif precision == "fp32":
            assert resumed["losses"] == pytest.approx(saved["losses"][3:], abs=2e-5)


def test_gradient_accumulation_gives_the_same_losses(ranks: Ranks, tmp_path: Path) -> None:
    def losses(world: int, micro_batch: int | None, folder: str) -> list[float]:
        root = tmp_path / folder
        root.mkdir()
        [result, *_] = ranks(
            f"{CASES}train_and_save",
            world,
            root=str(root),
            stage=1,
            precision="fp32",
            save_at=3,
            until=6,
            micro_batch=micro_batch,
        )
        return result["losses"]

    whole = losses(1, None, "a")
    assert losses(1, 2, "b") == pytest.approx(whole, abs=2e-5)
    assert losses(2, 2, "c") == pytest.approx(whole, abs=2e-5)


def damaged(ranks: Ranks, tmp_path: Path, damage: Callable[[Path], None], again: bool) -> dict[str, Any]:
    """Save at steps 2 and (again) 4, damage the newest, resume."""
    arguments = {"root": str(tmp_path), "stage": 1, "precision": "fp32"}
    ranks(f"{CASES}train_and_save", 2, **arguments, save_at=2, until=2)
    if again:
        ranks(f"{CASES}train_and_save", 2, **arguments, save_at=4, until=4)
    damage(max(tmp_path.iterdir()))
    return ranks(f"{CASES}resume", 2, **arguments, until=5)[0]


def flip_bit(checkpoint: Path) -> None:
    shard = checkpoint / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "shard-00000.safetensors", 1000)


def lose_shard(checkpoint: Path) -> None:
    (checkpoint / "shard-00001.safetensors").unlink()


def tear_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 40)


DAMAGE = [
    (flip_bit, "shard-00001.safetensors: altered"),
    (truncate, "shard-00000.safetensors: 1000 bytes, the manifest says"),
    (lose_shard, "shard-00001.safetensors: missing"),
    (tear_manifest, "manifest.json: damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    ranks: Ranks, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    resumed = damaged(ranks, tmp_path, damage, again=True)
    assert resumed["step"] == 2
    assert any(message in warning for warning in resumed["warnings"])


def test_when_all_are_damaged_the_run_does_not_start_over(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="no checkpoint is whole"):
        damaged(ranks, tmp_path, flip_bit, again=False)


def test_a_manifest_of_the_first_format_which_did_not_name_the_states_is_read(ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"root": str(tmp_path), "stage": 1, "precision": "fp32"}
    [saved, *_] = ranks(f"{CASES}train_and_save", 2, **arguments, save_at=2, until=2)
    [file] = tmp_path.glob("*/manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["states"]
    file.write_text(json.dumps(manifest | {"format": 1}))
    [resumed, *_] = ranks(f"{CASES}resume", 1, **arguments, until=2)
    assert resumed["loaded"] == saved["saved"]


def test_without_a_manifest_there_is_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    resumed = damaged(ranks, tmp_path, lambda checkpoint: (checkpoint / "manifest.json").unlink(), again=True)
    assert resumed["step"] == 2
    assert resumed["warnings"] == []


@pytest.mark.parametrize("phase", ["before shard", "after shard", "before manifest", "after manifest"])
def test_a_rank_killed_during_a_save_never_costs_the_previous_checkpoint(
    ranks: Ranks, tmp_path: Path, phase: str
) -> None:
    with pytest.raises(RanksFailed, match="-9"):
        ranks(f"{CASES}killed_while_saving", 2, root=str(tmp_path), phase=phase, timeout=30)
    [resumed, *_] = ranks(f"{CASES}resume", 2, root=str(tmp_path), stage=1, precision="fp32", until=5)
    assert resumed["step"] == (4 if phase == "after manifest" else 2)
    assert resumed["warnings"] == []


def test_a_full_disk_is_an_error_on_every_rank_and_the_previous_checkpoint_stays(ranks: Ranks, tmp_path: Path) -> None:
    [first, second] = ranks(f"{CASES}disk_full", 2, root=str(tmp_path))
    assert "the checkpoint could not be written" in first["error"]
    assert first["error"] == second["error"]
    assert first["complete"] == ["step-000000002"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks: Ranks, stage: int) -> None:
    results = ranks(f"{CASES}poisoned", 2, stage=stage)
    for result in results:
        assert result["applied"] == [True, False, True]
        assert result["unchanged"]
    assert results[0]["losses"] == results[1]["losses"]


def test_no_file_is_left_in_shared_memory(ranks: Ranks, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks(f"{CASES}train_and_save", 2, root=str(tmp_path), stage=1, precision="fp32", save_at=1, until=1)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "deepspeed" in name]
