"""Checkpoints: exact at any stage and number of ranks, and never torn."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.checkpoint_folder import complete, step_of, step_path
from tests.checkpoints import manifest_of, write_manifest
from tests.conftest import RanksFailed
from tests.distributed.cases_checkpoint import LAST, SAVED
from tests.runs import SMALL, attempts

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.cases:"
HERE = "tests.distributed.cases_checkpoint:"


def saved_everywhere(ranks: Ranks, root: Path, precision: str) -> dict[str, Any]:
    sources: dict[str, Any] = {}
    for world in (1, 2):
        sources |= ranks(f"{HERE}save_at_every_stage", world, root=str(root), precision=precision)[0]
    return sources


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_and_number_of_ranks_reads_every_other_bit_for_bit(
    ranks: Ranks, tmp_path: Path, precision: str
) -> None:
    """And on the same stage and number of ranks the run ends as if it had run through, with one break or with three."""
    sources = saved_everywhere(ranks, tmp_path, precision)
    for world in (1, 2):
        results = ranks(f"{HERE}load_at_every_stage", world, root=str(tmp_path), precision=precision)[0]
        assert len(results) == len(sources) ** 2 // 2
        for way, result in results.items():
            source, target = way.split(" to ")
            expected = sources[source]
            assert result["step"] == SAVED
            assert result["before"] != expected["saved"]
            assert result["loaded"] == expected["saved"], way
            if source == target:
                assert result["losses"] == expected["losses"], way
                assert result["final"] == expected["final"], way
            elif precision == "fp32":
                assert result["losses"] == pytest.approx(expected["losses"][:1], abs=2e-5), way
    for world in (1, 2):
        [resumed, *_] = ranks(f"{HERE}resume_at_each_step", world, root=str(tmp_path), precision=precision)
        for source, result in resumed.items():
            assert result["from"] == list(range(SAVED, LAST))
            assert result["losses"] == sources[source]["losses"], source
            assert result["final"] == sources[source]["final"], source


def test_the_proof_above_fails_when_nothing_is_loaded(ranks: Ranks, tmp_path: Path) -> None:
    sources = ranks(f"{HERE}save_at_every_stage", 1, root=str(tmp_path), precision="bf16")[0]
    results = ranks(f"{HERE}load_at_every_stage", 1, root=str(tmp_path), precision="bf16", sabotage=True)[0]
    for way, result in results.items():
        expected = sources[way.split(" to ")[0]]
        assert result["loaded"] != expected["saved"]
        assert result["losses"] != expected["losses"]


def test_from_stage_to_stage_and_back(ranks: Ranks, tmp_path: Path) -> None:
    """Four resumes in a row, each elsewhere: no state is lost on the way, and it is the same run."""
    root, straight = tmp_path / "chain", tmp_path / "straight"
    before: dict[str, Any] = {}
    losses: list[float] = []
    root.mkdir()
    for number, (stage, world) in enumerate([(1, 2), (3, 1), (2, 2), (0, 1), (3, 2)]):
        [result, *_] = ranks(f"{HERE}go_on", world, root=str(root), stage=stage)
        assert result["from"] == 2 * number
        if before:
            assert result["loaded"] == before["saved"]
        before = result
        losses += result["losses"]
    [expected, *_] = ranks(
        f"{CASES}train_and_save", 2, root=str(straight), stage=1, precision="fp32", save_at=10, until=10
    )
    assert losses == pytest.approx(expected["losses"], abs=2e-5)


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


def test_random_number_generators_go_on_where_they_were(ranks: Ranks, tmp_path: Path) -> None:
    drawn = ranks(f"{HERE}draw", 2, root=str(tmp_path), resumed=False)
    assert drawn[0] != drawn[1]
    assert ranks(f"{HERE}draw", 2, root=str(tmp_path), resumed=True) == drawn
    [other] = ranks(f"{HERE}draw", 1, root=str(tmp_path), resumed=True)
    assert other != drawn[0], "of another number of ranks they are left alone"


def test_a_rollback_keeps_what_another_run_needs_and_forgets_the_loss_of_what_it_went_back_behind(
    ranks: Ranks, tmp_path: Path
) -> None:
    [result] = ranks(f"{HERE}back_and_again", 1, root=str(tmp_path))
    assert result["step"] == 1
    [warning] = result["warnings"]
    aside = warning.rpartition("now ")[2]
    assert f"needed by {tmp_path / 'other'}" in warning
    assert result["losses"] == {"step-000000001": None, "step-000000002": None, Path(aside).name: 1.5}


def test_training_goes_on_during_a_save_and_the_file_holds_the_snapshot(ranks: Ranks, tmp_path: Path) -> None:
    for result in ranks(f"{HERE}snapshots", 2, root=str(tmp_path)):
        assert result["polls"] == [[1, False]] * 3, "the first save is held up"
        assert result["loaded"] == result["saved"]
        assert result["saved"][0] != result["saved"][1], "the weights changed while it was written"
        assert result["pointers"][0] == result["pointers"][1], "the buffers are allocated once"
        assert len(result["pointers"][0]) == 3


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
    content[len(content) // 2] ^= 4
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


def test_manifests_of_older_formats_without_buffers_and_without_states_are_read(ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"root": str(tmp_path), "stage": 1, "precision": "fp32"}
    [saved, *_] = ranks(f"{CASES}train_and_save", 2, **arguments, save_at=2, until=2)
    [folder] = tmp_path.iterdir()
    manifest = manifest_of(folder)
    for number, absent in ((3, []), (2, ["buffers"]), (1, ["states", "validation_loss", "saved"])):
        for name in absent:
            del manifest[name]
        write_manifest(folder, manifest | {"format": number})
        [resumed, *_] = ranks(f"{CASES}resume", 1, **arguments, until=2)
        assert resumed["loaded"] == saved["saved"]


def test_without_a_manifest_there_is_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    resumed = damaged(ranks, tmp_path, lambda checkpoint: (checkpoint / "manifest.json").unlink(), again=True)
    assert resumed["step"] == 2
    assert resumed["warnings"] == []


def test_a_full_disk_is_an_error_on_every_rank_and_the_previous_checkpoint_stays(ranks: Ranks, tmp_path: Path) -> None:
    """It comes at a later step's edge, and the half of a shard that fills the disk is removed."""
    [first, second] = ranks(f"{HERE}disk_full", 2, root=str(tmp_path))
    assert "shard-00001.safetensors: the checkpoint could not be written: [Errno 27] File too large" in first["error"]
    assert first == second
    assert first["left"] == ["shard-00000.safetensors"]
    assert first["step"] == 2
    assert first["whole"]


def test_a_run_that_was_taken_over_publishes_and_removes_nothing(ranks: Ranks, tmp_path: Path) -> None:
    for result in ranks(f"{HERE}taken_over", 2, root=str(tmp_path)):
        assert result == {"error": "taken over", "complete": ["step-000000001"]}


def test_a_clean_up_that_fails_is_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    [first, second] = ranks(f"{HERE}clean_up_fails", 2, root=str(tmp_path))
    assert first["complete"] == 3
    assert len(first["warnings"]) == 2, "of the saves at steps 2 and 3: each has more to say"
    assert all("step-000000001: could not be removed" in text for text in first["warnings"])
    assert second["warnings"] == []


def test_a_start_among_copies_archives_and_damage_goes_on_and_a_foreign_checkpoint_ends_it(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    run_dir, root, archive = tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "archive"
    args = [*SMALL, f"data.path={dataset}", "train.checkpoint_every=2", "train.keep_checkpoints=9", "train.steps=8"]
    ranks(f"{CASES}train_run", 1, args=[*args, f"run.dir={run_dir}", "run.name=one"])
    shutil.move(step_path(root, 2), archive)
    step_path(root, 2).symlink_to(archive)
    shutil.copytree(step_path(root, 4), step_path(root, 10))
    shutil.copytree(step_path(root, 4), root / "step-000000008.bak")
    (root / "step-000000012.tar").touch()
    manifest = step_path(root, 8) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"samples_seen":64', b'"samples_seen":72'))
    again = [*args, f"run.dir={run_dir}", "run.name=one", "train.keep_checkpoints=1"]
    ranks(f"{CASES}train_run", 1, args=again)
    [first, second] = attempts(run_dir / "metrics.jsonl")
    assert second[0] == 6, "the one before the damaged one"
    assert all(metrics["loss/train"] == first[1][step]["loss/train"] for step, metrics in second[1].items())
    assert [step_of(path) for path in complete(root)] == [8]
    assert sorted(path.name for path in root.iterdir() if step_of(path) != 8) == [
        "step-000000008.bak",
        "step-000000010",
        "step-000000012.tar",
    ]
    assert {path.name for path in archive.iterdir()} == {"manifest.json", "shard-00000.safetensors"}
    ranks(f"{CASES}train_run", 1, args=[*args, f"run.dir={tmp_path / 'two'}", "run.name=two", "train.steps=2"])
    shutil.copytree(step_path(root, 8), step_path(tmp_path / "two" / "checkpoints", 8))
    with pytest.raises(RanksFailed, match=r"step-000000008: of another run .* duet train --from RUN@8"):
        ranks(f"{CASES}train_run", 1, args=[*args, f"run.dir={tmp_path / 'two'}", "run.name=two", "train.steps=2"])


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
