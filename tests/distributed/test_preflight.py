"""A preflight names the node that is at fault, and only that one."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.manifest import Manifest
from tests.runs import SMALL

CASE = "tests.distributed.preflight_cases:run"
Ranks = Callable[..., list[Any]]
LIMITS = {"arrival": 60, "stage": 1.5, "answer": 0.5}


def arguments(data: Path, run_dir: Path, ranks: int) -> list[list[str]]:
    return [[*SMALL, f"data.path={data}", f"run.dir={run_dir}"] for _ in range(ranks)]


def test_good_nodes_pass_and_everything_is_measured(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", 3)
    verdict, *others = ranks(CASE, 3, args=args)
    assert others == [None, None]
    assert verdict["nodes"] == ["n0", "n1", "n2"]
    assert not (verdict["bad"] or verdict["shared"] or verdict["exchange"])
    assert list(verdict["measured"]) == [
        "matrix product",
        "write and fsync",
        "links between nodes",
        "all-reduce",
        "clocks",
    ]
    assert list(tmp_path.iterdir()) == [], "it left something"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("slow", "rank 2 multiplies at"),
        ("miscalculating", "wrong matrix product on cpu"),
        ("outdated", "torch is 2.9.0, but 2."),
        ("full", "the file size limit is reached"),
    ],
)
def test_a_faulty_node_is_named(ranks: Ranks, dataset: Path, tmp_path: Path, fault: str, told: str) -> None:
    verdict = ranks(CASE, 3, args=arguments(dataset, tmp_path, 3), faults={"2": fault})[0]
    assert list(verdict["bad"]) == ["n2"]
    [reason] = verdict["bad"]["n2"]
    assert told in reason
    assert not (verdict["shared"] or verdict["exchange"])


def test_a_copy_of_the_data_that_is_damaged_on_one_node(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / Manifest.load(copy).shards_of("train")[0].path
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    args = arguments(dataset, tmp_path, 2)
    args[1] = arguments(copy, tmp_path, 1)[0]
    verdict = ranks(CASE, 2, args=args)[0]
    assert list(verdict["bad"]) == ["n1"]
    assert str(shard) in verdict["bad"]["n1"][0]


@pytest.mark.parametrize("fault", ["missing", "full"])
def test_what_all_nodes_share_is_no_nodes_fault(ranks: Ranks, dataset: Path, tmp_path: Path, fault: str) -> None:
    args = arguments(tmp_path / "nothing" if fault == "missing" else dataset, tmp_path, 2)
    verdict = ranks(CASE, 2, args=args, faults={} if fault == "missing" else {"0": fault, "1": fault})[0]
    assert verdict["bad"] == {}
    [error] = verdict["shared"]
    assert ("is not a dataset" if fault == "missing" else "the file size limit is reached") in error


def test_a_clock_that_is_ahead(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    verdict = ranks(CASE, 3, args=arguments(dataset, tmp_path, 3), faults={"1": "ahead"})[0]
    [warning] = [text for text in verdict["warnings"] if "clock" in text]
    [seconds] = re.findall(r"^n1: its clock is (.*) s ahead", warning)
    assert 3 < float(seconds) <= 7, "what is certain, however long the messages took"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("absent", "rank 1 did not come within 1 s"),
        ("hanging", "rank 1 hangs in the matrix product, for 1.5 s"),
        ("late", "rank 1 hangs in its own work between two exchanges, for 1.5 s"),
    ],
)
def test_a_rank_that_is_missing_or_stuck_is_named(
    ranks: Ranks, dataset: Path, tmp_path: Path, fault: str, told: str
) -> None:
    limits = LIMITS | ({"arrival": 1} if fault == "absent" else {})
    verdict = ranks(CASE, 2, args=arguments(dataset, tmp_path, 2), faults={"1": fault}, **limits)[0]
    assert verdict["bad"] == {"n1": [told]}
    assert not (verdict["shared"] or verdict["exchange"])


def test_ranks_that_are_stopped_or_killed_in_the_middle_are_named(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    faults = {"1": "stopped", "2": "killed"}
    verdict = ranks(CASE, 4, killed=2, args=arguments(dataset, tmp_path, 4), faults=faults, **LIMITS)[0]
    told = "does not answer any more, since the exchange with the others"
    assert verdict["bad"] == {"n1": [f"rank 1 {told}"], "n2": [f"rank 2 {told}"]}


def test_a_link_that_carries_nothing_is_named_but_neither_end_is_blamed(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    verdict = ranks(CASE, 2, args=arguments(dataset, tmp_path, 2), faults={"1": "mute"}, **LIMITS)[0]
    assert verdict["exchange"] == ["rank 0 on n0 waits for what rank 1 on n1 sends"]
    assert verdict["bad"] == {}
