"""A save that training goes on behind holds the state at its start, and nobody waits for ever."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RanksFailed
from tests.distributed.saver_cases import AT_GATE

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.saver_cases:"


def engine(stage: int, precision: str, *more: str) -> list[str]:
    return [f"engine.zero_stage={stage}", f"engine.precision={precision}", *more]


OFFLOAD, ACCUMULATION = "engine.offload=cpu", "batch.micro_batch=2"
MUON, IN_8_BITS = ("optimizer.kind=muon", "optimizer.clip=0"), "optimizer.kind=adamw8bit"
BATCH_NORM = ("model.architecture=encoder_only", "model.norm=batchnorm", "data.objective=masked")
FP32 = [engine(0, "fp32"), engine(1, "fp32", ACCUMULATION), engine(2, "fp32"), engine(3, "fp32")]
BF16 = [engine(1, "bf16"), engine(2, "bf16", OFFLOAD), engine(3, "bf16", ACCUMULATION)]
OTHERS = [
    *(engine(stage, precision, OFFLOAD) for stage, precision in ((1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16"))),
    *(engine(stage, precision, *MUON) for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16"))),
    engine(2, "fp32", *MUON, ACCUMULATION),
    *(engine(stage, precision, IN_8_BITS) for stage, precision in ((0, "fp32"), (2, "bf16"), (3, "fp32"))),
    *(engine(stage, "fp32", *BATCH_NORM) for stage in (0, 1, 3)),
]


def changed_while_copying(ranks: Ranks, root: Path, setups: list[list[str]], **how: Any) -> list[dict[str, Any]]:
    """Training or loading goes on while a save holds back one block until the main thread waits for it, or is over."""
    answers = ranks(f"{CASES}change_while_copying", 2, root=str(root), setups=setups, **how)
    for results in answers:
        assert len(results) == len(setups) * len(how["ways"])
        for result in results:
            assert result["changed"] != result["wanted"], result["what"]
    return [result for results in answers for result in results]


@pytest.mark.parametrize("setups", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_update_waits_for_the_copy(ranks: Ranks, tmp_path: Path, setups: list[list[str]]) -> None:
    """Which also holds that the passes before it change nothing that is saved."""
    for result in changed_while_copying(ranks, tmp_path, setups, ways=["step"]):
        assert result["saved"] == result["wanted"], result["what"]


def test_a_load_waits_for_the_copy_and_so_does_the_update_after_a_skipped_one(ranks: Ranks, tmp_path: Path) -> None:
    """At stage 0 a step is skipped before it would wait."""
    for result in changed_while_copying(ranks, tmp_path, [engine(0, "fp32")], ways=["load", "skip a step"]):
        assert result["saved"] == result["wanted"], result["what"]


@pytest.mark.drill
def test_an_update_waits_for_the_copy_whatever_the_optimizer_and_the_place_of_its_state(
    ranks: Ranks, tmp_path: Path
) -> None:
    for result in changed_while_copying(ranks, tmp_path, [*FP32, *BF16, *OTHERS], ways=["step", "load"]):
        assert result["saved"] == result["wanted"], result["what"]


@pytest.mark.parametrize("sabotage", ["no gate", "do not wait"])
def test_the_proof_above_fails_when_an_update_does_not_wait(ranks: Ranks, tmp_path: Path, sabotage: str) -> None:
    setup = engine(1, "bf16")
    for result in changed_while_copying(ranks, tmp_path, [setup], ways=["step"], sabotage=sabotage):
        assert result["saved"] != result["wanted"], result["what"]


def test_what_an_update_has_waited_is_told(ranks: Ranks, tmp_path: Path) -> None:
    [[told]] = ranks(f"{CASES}wait_at_the_gate", 1, root=str(tmp_path))
    assert told > AT_GATE


def test_a_copy_that_fails_ends_all_ranks_after_the_step(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="a bug in the copy") as failure:
        ranks(f"{CASES}fail_to_copy", 2, root=str(tmp_path))
    assert str(failure.value).startswith("exit codes [1, 1]"), "none of them hangs"
    assert str(failure.value).count("the step is over") == 2


def test_a_run_that_ends_while_it_copies_leaves_no_checkpoint_and_no_thread(ranks: Ranks, tmp_path: Path) -> None:
    for result in ranks(f"{CASES}leave_while_copying", 2, root=str(tmp_path)):
        assert result == {"error": "the run ends", "complete": 0, "threads": []}
