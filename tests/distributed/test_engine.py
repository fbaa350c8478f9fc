"""The engine: the same training at every stage, whatever moves the parameters and wherever their state lies."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from pretrain.config.schema import load
from pretrain.run.journal import read
from tests.conftest import RanksFailed
from tests.runs import SMALL

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.engine_cases:"
MUON = ("optimizer.kind=muon", "optimizer.clip=0")
OFFLOAD = ("engine.offload=cpu",)


def engine(stage: int, precision: str, *more: str) -> list[str]:
    return [f"engine.zero_stage={stage}", f"engine.precision={precision}", *more]


CLIP = "optimizer.clip=0.01"


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> dict[str, Any]:
    """ZeRO 1, fp32, two ranks, clipping at work."""
    [found, _] = ranks(f"{CASES}norms", 2, args=engine(1, "fp32", CLIP), steps=4)
    assert min(found["norms"]) > 0.01
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_and_global_norms_are_the_same_at_every_stage(ranks: Ranks, plain: dict[str, Any], stage: int) -> None:
    [found, _] = ranks(f"{CASES}norms", 2, args=engine(stage, "fp32", CLIP), steps=4)
    assert found["losses"] == pytest.approx(plain["losses"], abs=2e-6)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    if stage == 3:
        assert found["losses"] == plain["losses"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activation_checkpointing_changes_no_loss(ranks: Ranks, plain: dict[str, Any], stage: int) -> None:
    args = engine(stage, "fp32", CLIP)
    [found, _] = ranks(f"{CASES}norms", 2, args=[*args, "engine.activation_checkpointing=true"], steps=4)
    if stage in (0, 2):
        assert found == ranks(f"{CASES}norms", 2, args=args, steps=4)[0]
    assert found["losses"] == plain["losses"] or stage in (0, 2)  # 3 as 1: see above
    assert found["names"] == plain["names"]


def test_activation_checkpointing_keeps_less(ranks: Ranks) -> None:
    kept, less = (
        ranks(f"{CASES}activations", 1, args=engine(1, "fp32", f"engine.activation_checkpointing={on}"))[0]
        for on in ("false", "true")
    )
    assert less < 0.6 * kept


@pytest.mark.drill
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_compiled_layers_train_alike_under_the_same_names(
    ranks: Ranks, plain: dict[str, Any], stage: int, recompute: str
) -> None:
    more = ("engine.compile=true", f"engine.activation_checkpointing={recompute}")
    [found, _] = ranks(f"{CASES}norms", 2, args=engine(stage, "fp32", CLIP, *more), steps=4, timeout=600)
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert found["names"] == plain["names"]


def saved(ranks: Ranks, root: Path, world: int, args: list[str]) -> dict[str, Any]:
    return ranks(f"{CASES}train_and_save", world, root=str(root), args=args, save_at=2, until=4)[0]


def resumed(ranks: Ranks, root: Path, world: int, args: list[str]) -> dict[str, Any]:
    return ranks(f"{CASES}resume", world, root=str(root), args=args, until=4)[0]


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ((0, "fp32", 2), [(0, 2), (1, 1)]),
        ((1, "fp32", 2), [(1, 2), (0, 1), (2, 1)]),
        ((3, "fp32", 2), [(3, 2), (1, 2)]),
        ((2, "bf16", 2), [(2, 2), (2, 1)]),
        ((3, "bf16", 1), [(3, 1), (2, 2)]),
    ],
)
def test_muon_reaches_every_stage_and_world_size_bit_for_bit(
    ranks: Ranks, tmp_path: Path, source: tuple[int, str, int], others: list[tuple[int, int]]
) -> None:
    stage, precision, world = source
    run = saved(ranks, tmp_path, world, engine(stage, precision, *MUON))
    kept = {"fp32 float32", "exp_avg float32", "exp_avg_sq float32", f"momentum_buffer {TYPES[precision]}"}
    assert set(run["saved"]) == kept
    for other_stage, other_world in others:
        found = resumed(ranks, tmp_path, other_world, engine(other_stage, precision, *MUON))
        assert found["loaded"] == run["saved"], f"to ZeRO {other_stage} on {other_world}"
        if (other_stage, other_world) == (stage, world):
            assert found["losses"] == run["losses"][2:]
            assert found["final"] == run["final"]
        elif precision == "fp32":  # the Newton-Schulz iteration makes small differences larger
            assert found["losses"] == pytest.approx(run["losses"][2:], abs=1e-3)


TYPES = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.mark.parametrize(
    ("stage", "precision", "others"),
    [
        (1, "fp32", [(1, 2, OFFLOAD), (2, 1, OFFLOAD), (1, 2, ())]),
        (2, "bf16", [(2, 2, OFFLOAD), (3, 1, OFFLOAD), (1, 2, OFFLOAD)]),
        (3, "fp32", [(3, 2, OFFLOAD), (1, 2, ())]),
    ],
)
def test_an_offloaded_state_reaches_every_stage_and_comes_back_bit_for_bit(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, others: list[tuple[int, int, tuple[str, ...]]]
) -> None:
    run = saved(ranks, tmp_path, 2, engine(stage, precision, *OFFLOAD))
    for other_stage, other_world, more in others:
        found = resumed(ranks, tmp_path, other_world, engine(other_stage, precision, *more))
        assert found["loaded"] == run["saved"], f"to ZeRO {other_stage} on {other_world} {more}"
        if (other_stage, other_world, more) == (stage, 2, OFFLOAD):
            assert found["losses"] == run["losses"][2:]
            assert found["final"] == run["final"]


@pytest.mark.parametrize("micro_batch", ["2", "null"])
def test_a_step_that_is_not_finite_leaves_no_trace_in_an_offloaded_state(ranks: Ranks, micro_batch: str) -> None:
    more = (*OFFLOAD, f"batch.micro_batch={micro_batch}")
    setups = [engine(stage, p, *more) for stage, p in ((1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16"))]
    for found in ranks(f"{CASES}skipped_steps", 2, setups=setups):
        for setup, ((applied, skipped), (_, left_out)) in zip(setups, found, strict=True):
            assert applied == [True, False, True, True], setup
            assert skipped == left_out, setup


IN_8_BITS = ("optimizer.kind=adamw8bit",)


@pytest.mark.parametrize(
    ("stage", "precision", "world", "others"),
    [
        (0, "fp32", 2, [(1, "fp32", 2)]),
        (1, "bf16", 2, [(1, "bf16", 1)]),
        (2, "bf16", 2, [(3, "bf16", 2), (0, "fp32", 1)]),
        (3, "fp32", 1, [(3, "fp32", 2)]),
    ],
)
def test_moments_in_8_bits_come_back_exactly_and_elsewhere_within_a_step_of_the_map(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, world: int, others: list[tuple[int, str, int]]
) -> None:
    run = saved(ranks, tmp_path, world, engine(stage, precision, *IN_8_BITS))
    found = resumed(ranks, tmp_path, world, engine(stage, precision, *IN_8_BITS))
    assert found["loaded"] == run["saved"]
    assert found["losses"] == run["losses"][2:]
    assert found["final"] == run["final"]
    for other_stage, other_precision, other_world in others:
        args = engine(other_stage, other_precision, *IN_8_BITS)
        answers = ranks(f"{CASES}requantised", other_world, root=str(tmp_path), args=args)
        assert {answer["loaded"]["fp32 float32"] for answer in answers} == {run["saved"]["fp32 float32"]}
        assert not all(answer["exact"] for answer in answers), "the blocks were to be others"
        assert max(answer["error"] for answer in answers) < 0.501, f"to ZeRO {other_stage} on {other_world}"


def test_moments_in_8_bits_go_with_offload(ranks: Ranks, tmp_path: Path) -> None:
    run = saved(ranks, tmp_path, 2, engine(2, "bf16", *IN_8_BITS, *OFFLOAD))
    found = resumed(ranks, tmp_path, 2, engine(2, "bf16", *IN_8_BITS))
    assert found["loaded"] == run["saved"]


def test_adamw_in_8_bits_trains_as_adamw_in_a_quarter_of_its_memory(ranks: Ranks) -> None:
    args, kinds = engine(1, "bf16", "model.width=64"), ["adamw", "adamw8bit"]
    [(plain, size), (ours, less)], _ = ranks(f"{CASES}compared_losses", 2, args=args, kinds=kinds, steps=30)
    assert ours[0] == plain[0]
    assert ours != plain
    assert ours == pytest.approx(plain, abs=0.15)
    assert ours[-1] == pytest.approx(plain[-1], abs=0.01)
    assert ours[-1] < 0.1 * ours[0]
    assert 0.25 < less / size < 0.26


@pytest.mark.drill
def test_a_run_in_8_bits_says_when_a_resume_quantises_anew(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = [*SMALL, *IN_8_BITS, f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "schedule.kind=wsd"]
    for stage, steps in [(1, 3), (2, 5)]:
        run = [*args, *engine(stage, "bf16"), f"train.steps={steps}"]
        ranks("tests.distributed.cases:train_run", 1, args=run)
    records = list(read(tmp_path / "run" / "metrics.jsonl"))
    was, now = "zero_stage=1, bf16, world size 1", "zero_stage=2, bf16, world size 1"
    warnings = [record.fields["text"] for record in records if record.kind == "warning"]
    assert [text.partition(": ")[2] for text in warnings] == [
        f"{moment} was saved as 8-bit blocks ({was}) and is 8-bit blocks ({now}) now: it was converted"
        for moment in ("exp_avg", "exp_avg_sq")
    ]
    [first, *_, last] = [record.metrics for record in records if "loss/train" in record.metrics]
    assert "optim/update_ratio" not in first | last
    assert last["optim/param_norm"] > 0
    assert last["loss/train"] < first["loss/train"]


@pytest.mark.parametrize("architecture", ["parallel_encoder_decoder", "decoder_only"])
def test_muon_moves_the_matrices_of_the_layers_and_nothing_else(ranks: Ranks, architecture: str) -> None:
    [found] = ranks(f"{CASES}tagged", 1, args=engine(1, "fp32", *MUON, f"model.architecture={architecture}"))
    assert {"token_embed.weight", "position_embed.weight", "final_norm.weight"} <= set(found["adamw"])
    parts = {name.rsplit(".", 2)[-2] for name in found["muon"]}
    assert parts <= {"qkv", "out", "query", "key_value", "up", "down", "decoder_input"}
    assert all(name.endswith(".weight") for name in found["muon"])
    assert not [name for name in found["adamw"] if name.split(".")[-2] in parts and name.endswith(".weight")]


def test_muons_step_is_its_formula(ranks: Ranks) -> None:
    """Of one step from zero momentum: orthogonal update, scaled, with decoupled weight decay; DeepSpeed's iteration
    works in half precision where the processor can."""
    [errors] = ranks(f"{CASES}muon_step", 1, args=engine(1, "fp32", *MUON))
    assert errors
    assert max(errors.values()) < 0.05


@pytest.mark.drill
def test_a_run_with_muon_tells_what_it_knows_and_what_a_resume_converts(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    args = [*SMALL, *MUON, f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "schedule.kind=wsd"]
    ranks(f"{CASES}muon_run", 2, args=[*args, *engine(2, "bf16"), "train.steps=3"])
    ranks(f"{CASES}muon_run", 1, args=[*args, *engine(1, "fp32"), "train.steps=5"])
    records = list(read(tmp_path / "run" / "metrics.jsonl"))
    [text] = [record.fields["text"] for record in records if record.kind == "warning"]
    assert text.endswith("momentum_buffer was saved as bfloat16 and is float32 now: it was converted")
    [first, *_, last] = [record.metrics for record in records if "loss/train" in record.metrics]
    assert "optim/update_ratio" not in first | last
    assert last["optim/param_norm"] > 0
    assert last["loss/train"] < first["loss/train"]


@pytest.mark.drill
def test_muons_compiled_kernel_trains_as_the_written_one(ranks: Ranks) -> None:
    written, compiled = (
        ranks(f"{CASES}muon_losses", 2, args=engine(2, "bf16", *MUON), compiled=compiled, timeout=600)[0]
        for compiled in (False, True)
    )
    assert compiled == pytest.approx(written, abs=1e-2)


@pytest.mark.parametrize(
    ("stage", "precision", "kind", "elsewhere"),
    [(0, "fp32", "adamw", 3), (1, "fp32", "adamw8bit", None), (2, "bf16", "adamw", 1), (3, "bf16", "adamw", 2)],
)
def test_masks_move_at_their_own_learning_rate(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, kind: str, elsewhere: int | None
) -> None:
    more = (f"optimizer.kind={kind}", "optimizer.lr=1e-2", "optimizer.mask_lr=1e-3", "optimizer.weight_decay=0")
    [first, _] = ranks(f"{CASES}first_update", 2, args=engine(stage, precision, *more))
    assert len(first) > 10
    for name, largest in first.items():  # AdamW moves an element by the learning rate first
        assert largest == pytest.approx(1e-3 if "dropout." in name else 1e-2, rel=0.1), name
    if elsewhere is not None:
        run = saved(ranks, tmp_path, 2, engine(stage, precision, *more))
        found = resumed(ranks, tmp_path, 1, engine(elsewhere, precision, *more))
        assert found["loaded"] == run["saved"]
        assert found["losses"] == pytest.approx(run["losses"][2:], abs=1e-4)


def test_the_engine_is_quiet_and_its_collectives_end_in_time(ranks: Ranks) -> None:
    [found, _] = ranks(f"{CASES}surroundings", 2, args=engine(3, "fp32", "engine.timeout_minutes=2"))
    assert found["groups"] >= 2, "DeepSpeed's own, too"
    assert found["timeouts"] == [120.0]
    assert found["level"] == logging.ERROR
    assert not [path for path in found["caches"].values() if Path(path).is_relative_to(Path.home())]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["engine.precision=fp16"], "engine.precision=fp16 needs CUDA; on cpu use engine.precision=bf16 or fp32"),
        (["engine.zero_stage=3", "engine.hpz_partition_size=2"], "engine.hpz_partition_size=2 needs CUDA"),
    ],
)
def test_what_this_hardware_cannot_do_is_refused(ranks: Ranks, args: list[str], message: str) -> None:
    with pytest.raises(RanksFailed, match=message):
        ranks(f"{CASES}norms", 1, args=args, steps=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["engine.zero_stage=0"], "use engine.zero_stage=1, or engine.precision=fp32"),
        (["engine.zero_stage=0", "engine.precision=fp16"], "cannot accumulate fp16 gradients in fp32"),
        (engine(0, "fp32", *OFFLOAD), "zero_stage=0 divides nothing; use 1, 2 or 3"),
        (["engine.offload=nvme"], "nvme would move the optimizer's state out of a checkpoint's reach; use cpu"),
        (["engine.hpz_partition_size=2"], "hpz_partition_size=2 divides the parameters of ZeRO 3"),
        (["optimizer.kind=muon"], "never makes the update orthogonal; use engine.zero_stage=2"),
        (engine(2, "bf16", "optimizer.kind=muon"), "use optimizer.clip=0"),
        (engine(2, "bf16", *MUON, *OFFLOAD), "without engine.offload"),
        (engine(2, "fp16", *MUON), "muon is for bf16 and fp32"),
        (engine(2, "bf16", *MUON, "optimizer.mask_lr=1e-3"), "matrices itself; use optimizer.mask_lr=null"),
        (["optimizer.mask_lr=1e-3", "model.learned_dropout.enabled=false"], "but there are no masks"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_the_reason(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(args)
    assert message in str(caught.value)
