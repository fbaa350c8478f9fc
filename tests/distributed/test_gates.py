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
    [alone] = ranks(f"{CASE}follow", 1, engine=["zero_stage=0"], root=root)
    engine = ["zero_stage=3", "activation_checkpointing=true"]
    [one, other] = ranks(f"{CASE}follow", 2, engine=engine, root=root)
    [resumed] = ranks(f"{CASE}follow", 1, engine=["zero_stage=1"], root=root, source="ranks-2")
    assert one == other
    for kind in ("cosine", "top"):
        assert set(alone[kind]["saved"]) == (NAMES if kind == "cosine" else set())
        assert one[kind]["losses"] == pytest.approx(alone[kind]["losses"], rel=1e-5)
        assert one[kind]["last"] == pytest.approx(alone[kind]["last"], rel=1e-4)
        assert resumed[kind]["saved"] == one[kind]["saved"]
        assert resumed[kind]["losses"] == pytest.approx(one[kind]["losses"][2:], rel=1e-5)
        assert resumed[kind]["last"] == pytest.approx(one[kind]["last"], rel=1e-4)
    assert all(0.1 < value < alone["cosine"]["last"][name] for name, value in alone["cosine"]["saved"].items())


def test_multipliers_are_in_fp32_and_a_skipped_step_leaves_them(ranks: Ranks, tmp_path: Path) -> None:
    [found] = ranks(f"{CASE}follow", 1, engine=["zero_stage=1", "precision=bf16"], root=str(tmp_path))
    assert found["cosine"]["types"] == ["torch.float32"]
    assert all(found["cosine"]["last"].values())
    [one, other] = ranks(f"{CASE}skipped", 2, stage=1)
    assert one["buffers"] == other["buffers"]
    assert one["applied"] == [True, False]
    assert one["kept"] == [True, True]
