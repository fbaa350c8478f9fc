"""Block gates over ranks: the same on any number of them, at any ZeRO stage and when layers are computed twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ranks = Callable[..., list[Any]]
CASE = "tests.distributed.gate_cases:"
NAMES = {f"backbone.layers.{layer}.ff.multiplier" for layer in (0, 1)}


def test_ranks_and_stages_agree_on_losses_and_multipliers_and_go_on_from_each_others_checkpoints(
    ranks: Ranks, tmp_path: Path
) -> None:
    root = str(tmp_path)
    for kind in ("cosine", "top"):
        [alone] = ranks(f"{CASE}follow", 1, kind=kind, engine=["zero_stage=0"], root=root)
        engine = ["zero_stage=3", "activation_checkpointing=true"]
        [one, other] = ranks(f"{CASE}follow", 2, kind=kind, engine=engine, root=root)
        assert one == other
        assert one["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert set(alone["after"]) == (NAMES if kind == "cosine" else set())
        assert one["after"] == pytest.approx(alone["after"], rel=1e-4)
        assert all(value > 0.1 for value in one["after"].values()), "two steps, and not one, have moved them"
        more = ["zero_stage=1", "precision=fp32"]
        [resumed] = ranks(f"{CASE}follow", 1, kind=kind, engine=more, root=root, source=f"{kind}-2")
        assert resumed["before"] == one["after"]
        assert resumed["losses"][0] < alone["losses"][0]


def test_multipliers_are_in_fp32_and_a_skipped_step_leaves_them(ranks: Ranks, tmp_path: Path) -> None:
    [found] = ranks(f"{CASE}follow", 1, kind="cosine", engine=["zero_stage=1", "precision=bf16"], root=str(tmp_path))
    assert found["types"] == []
    assert all(found["after"].values())
    [one, other] = ranks(f"{CASE}skipped", 2, stage=1)
    assert one["buffers"] == other["buffers"]
    assert one["applied"] == [True, False]
    assert one["kept"] == [True, True]
