"""What a model carries beside its parameters: the same on all ranks, saved and loaded, left alone by a skipped step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import CheckpointError
from model.architectures import registry
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.differences import shape_differences, tensor_differences
from pretrain.engine.buffers import persistent_buffers
from pretrain.run.checkpoint_folder import step_path
from tests.checkpoints import manifest_of, write_manifest
from tests.distributed.buffer_cases import SAVED, STAGES, config_of

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.buffer_cases:"
NORMS = ("backbone.layers.0.attention_norm", "backbone.layers.0.ff_norm", "final_norm")
BUFFERS = {f"{norm}.{name}" for norm in NORMS for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints of every stage on one and two ranks, and how those runs went on; all ranks alike in all of it."""
    root = tmp_path_factory.mktemp("buffers")
    results: dict[str, Any] = {}
    for world in (1, 2):
        found = ranks(f"{CASES}save_at_each_stage", world, root=str(root))
        assert found[0] == found[-1]
        results |= found[0]
    return root, results


def test_a_run_goes_on_bit_for_bit_and_any_stage_and_number_of_ranks_reads_it(
    ranks: Ranks, saved: tuple[Path, dict[str, Any]]
) -> None:
    """Losses, weights, moments, running statistics and what evaluation gives."""
    root, sources = saved
    for world in (1, 2):
        found = ranks(f"{CASES}load_at_each_stage", world, root=str(root), stages=STAGES)
        assert found[0] == found[-1]
        assert len(found[0]) == len(STAGES) * len(sources)
        for way, result in found[0].items():
            source, target = way.split(" to ")
            expected = sources[source]
            assert result["loaded"]["buffers"].keys() == BUFFERS
            assert result["loaded"]["digest"] == expected["saved"]["digest"], way
            assert result["loaded"]["buffers"] == expected["saved"]["buffers"], way
            if source == target:
                assert result["loaded"] == expected["saved"], way
                assert result["losses"] == expected["losses"], way
                assert result["final"] == expected["final"], way
    assert sources["1-2"]["saved"]["buffers"] != sources["1-2"]["final"]["buffers"]


def test_the_proof_above_fails_when_buffers_are_not_loaded(ranks: Ranks, saved: tuple[Path, dict[str, Any]]) -> None:
    root, sources = saved
    [found] = ranks(f"{CASES}load_at_each_stage", 1, root=str(root), stages=[1], sabotage=True)
    result, expected = found["1-1 to 1-1"], sources["1-1"]
    assert result["losses"] == expected["losses"], "training does not read them"
    assert result["loaded"]["logits"] != expected["saved"]["logits"]
    assert result["final"]["buffers"] != expected["final"]["buffers"]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "bf16")])
def test_ranks_agree_in_fp32_and_a_skipped_step_and_its_replay_leave_the_statistics(
    ranks: Ranks, stage: int, precision: str
) -> None:
    [one, other] = ranks(f"{CASES}skip", 2, stage=stage, precision=precision)
    assert one == other
    assert one["applied"] == [True, False]
    assert one["kept"] == [True, True]
    assert one["types"] == ["torch.float32", "torch.int64"]
    assert one["buffers"].keys() == BUFFERS
    if stage < 3:
        assert one["off"] < 1e-6, "the mean of all that both ranks have seen"


def test_deepspeeds_tool_reads_them_from_an_export(ranks: Ranks, tmp_path: Path) -> None:
    [found] = ranks(f"{CASES}export", 1, root=str(tmp_path))
    assert found == dict.fromkeys(BUFFERS, True)


def test_what_differs_is_told_and_what_is_missing_is_an_error(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, _ = saved
    one, two, alike = (Checkpoint(step_path(root / name, SAVED)) for name in ("1-1", "1-2", "1-1"))
    assert {d.name for d in tensor_differences(one, two) if d.state == "buffer"} == BUFFERS
    assert all(d.largest == 0 for d in tensor_differences(one, alike))
    assert shape_differences(one, two) == {}
    assert any(d.largest > 0 for d in tensor_differences(one, two) if d.state == "buffer")
    content = manifest_of(one.path)
    assert content["format"] == 4
    old = tmp_path / "old"
    old.mkdir()
    for shard in content["shards"]:
        (old / shard["file"]).symlink_to(one.path / shard["file"])
    name = min(BUFFERS)
    buffers = content.pop("buffers")
    write_manifest(old, content | {"format": 2})
    bare = Checkpoint(old)
    model = registry.build(config_of(1).model)
    with pytest.raises(CheckpointError, match=f"first difference: buffer {name} is missing here, .* in the run"):
        bare.check_buffers(persistent_buffers(model))
    assert shape_differences(bare, one) == {name: ("missing", f"{shape} buffer") for name, shape in buffers.items()}
    bare.check_buffers({})
    write_manifest(old, content | {"buffers": buffers | {"other": [3]}})
    with pytest.raises(CheckpointError, match=r"shard-00000.safetensors: damaged: .*buffer/other"):
        Checkpoint(old).buffers()
    with pytest.raises(CheckpointError, match="buffer/other is missing, the manifest says"):
        Checkpoint(old).verify()
