"""The verdict on nodes, the caps on excluding them, and what nvidia-smi says."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.commands.preflight import AVOID, FAILED, GOOD, STOP, conclude, planned_nodes, tasks_per_node
from launch.slurm.exclude import (
    AT_A_TIME,
    AVOIDED_SECONDS,
    IN_A_MONTH,
    MONTH,
    SHARE,
    avoided,
    exclude,
    refuse,
    to_avoid,
)
from pretrain.preflight.gpu import inspect, judge_gpus, parse_gpus, parse_processes
from pretrain.preflight.verdict import Finding, Link, Report, Verdict, judge
from pretrain.run.job_records import JobFolder

GPUS = """\
0, GPU-6ea5b16f-1bfa-4f1c-8ae5-4f3a2a0ce7f1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81008, 0
1, GPU-0c2f0d4e-3f1b-9d6e-7d7b-52a1c2b0a9e3, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81008, 0
"""
ECC_ERRORS = GPUS.replace("81008, 0\n1", "81008, 27\n1")
NO_ECC = "0, GPU-95ef7c5d-fc11-835b-cd38-2020193cf8e0, NVIDIA GeForce RTX 3090, 535.161.08, 24576, 24252, [N/A]\n"
IN_USE = "GPU-0c2f0d4e-3f1b-9d6e-7d7b-52a1c2b0a9e3, 3021, /opt/a/python, 61344\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
LOST = (
    "Unable to determine the device handle for GPU 0000:CA:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
)
NODES = [f"n{number}" for number in range(12)]


def reports(nodes: list[str]) -> list[Report]:
    return [Report(rank, node) for rank, node in enumerate(nodes)]


def test_gpus_are_read_and_judged() -> None:
    gpus = parse_gpus(GPUS)
    assert [(gpu.index, gpu.name, gpu.memory, gpu.ecc_errors) for gpu in gpus] == [
        (0, "NVIDIA H100 80GB HBM3", 81559.0, 0),
        (1, "NVIDIA H100 80GB HBM3", 81559.0, 0),
    ]
    assert not list(judge_gpus(gpus, [], 2))
    assert not list(judge_gpus(parse_gpus(NO_ECC), [], 1))
    for text, processes, expected, told in (
        (GPUS, "", 4, "2 of 4 GPUs are there"),
        (ECC_ERRORS, "", 2, "GPU 0 has 27 uncorrected ECC errors"),
        (GPUS, IN_USE, 2, "GPU 1 is in use by process 3021 (/opt/a/python)"),
        (GPUS.replace("81008", "12000", 1), "", 2, "GPU 0 has 12,000 of 81,559 MiB free, though no process is on it"),
    ):
        [finding] = judge_gpus(parse_gpus(text), parse_processes(processes), expected)
        assert (finding.level, finding.text) == ("node", told)


@pytest.mark.parametrize("text", [NO_DRIVER, LOST, "No devices were found\n"])
def test_what_the_driver_says_instead_is_passed_on(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in nvidia-smi's place, which says what it says without a working driver."""
    with pytest.raises(ValueError):
        parse_gpus(text)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{text}EOF\nexit 9\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [finding], same = inspect(2, None)
    assert finding.level == "node"
    assert text.strip() in finding.text
    assert same == {}


def test_no_gpu_is_a_fault_only_where_one_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert inspect(0, None) == ([], {})
    [finding], _ = inspect(8, None)
    assert finding.text == "8 GPUs are expected, but there is no nvidia-smi"


@given(st.sets(st.sampled_from(range(6)), min_size=1), st.sampled_from(["node", "place"]), st.integers(1, 3))
def test_a_fault_of_some_nodes_is_theirs_and_a_fault_of_all_is_nobodys(
    faulty: set[int], level: str, per_node: int
) -> None:
    nodes = [f"n{number}" for number in range(6) for _ in range(per_node)]
    found = reports(nodes)
    for report in found[::per_node]:
        if int(report.node[1:]) in faulty:
            report.findings.append(Finding("disk", level, "wrong"))  # type: ignore[arg-type]
    verdict = judge(found, len(found))
    assert not verdict.good
    assert set(verdict.bad) == ({f"n{number}" for number in faulty} if len(faulty) < 6 else set())
    assert bool(verdict.shared) == (len(faulty) == 6)


def test_the_only_node_of_a_job_can_be_bad_but_its_disk_may_be_everybodys() -> None:
    for level, bad in (("node", ["n0"]), ("place", [])):
        [report] = reports(["n0"])
        report.findings.append(Finding("any", level, "wrong"))  # type: ignore[arg-type]
        verdict = judge([report], 1)
        assert list(verdict.bad) == bad
        assert bool(verdict.shared) == (not bad)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=9))
def test_who_differs_from_most_is_named(values: list[str]) -> None:
    found = reports(NODES[: len(values)])
    for report, value in zip(found, values, strict=True):
        report.same["code hash"] = value
    bad = judge(found, len(found)).bad
    right = {value for node, value in zip(NODES, values, strict=False) if node not in bad}
    assert len(right) == 1
    assert values.count(right.pop()) == max(map(values.count, values))


def test_slow_ones_are_told_and_very_slow_ones_are_bad() -> None:
    found = reports(NODES[:5])
    for report, speed in zip(found, (100, 101, 99, 40, 15), strict=True):
        report.matmul_gflops = speed
        report.clock = (report.rank * 0.5 - 0.01, report.rank * 0.5 + 0.01)
        report.links = [Link((report.rank - 1) % 5, report.rank, 0.2 if report.rank == 2 else 1.0)]
    found[0].clock = (-90.0, -89.9)
    verdict = judge(found, 5)
    assert set(verdict.bad) == {"n4", "n0"}
    assert "multiplies at 15 GFLOP/s" in verdict.bad["n4"][0]
    assert "behind" in verdict.bad["n0"][0]
    assert [text.split(":")[0] for text in verdict.warnings] == ["n3", "slow link, rank 1 on n1 to rank 2 on n2"]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 12 * 3600.0), st.sets(st.sampled_from(NODES), min_size=1, max_size=4), st.integers(4, 60)
        ),
        max_size=30,
    )
)
def test_no_history_of_preflights_gets_past_the_caps(history: list[tuple[float, set[str], int]]) -> None:
    records: dict[str, dict[str, object]] = {}
    now = 1e9
    for number, (later, bad, num_nodes) in enumerate(history):
        now += later
        if refuse(bad, num_nodes, list(records.values()), f"job {number}", now) is None:
            assert len(bad) <= max(1, SHARE * num_nodes)
            records |= {node: {"node": node, "time": now, "job": f"job {number}"} for node in bad}
        ages = [now - record["time"] for record in records.values()]  # type: ignore[operator]
        assert sum(age < AVOIDED_SECONDS for age in ages) <= AT_A_TIME
        assert sum(age < MONTH for age in ages) <= IN_A_MONTH


def test_large_jobs_may_have_more_bad_nodes_and_old_ones_do_not_count() -> None:
    def day(number: int, count: int) -> list[dict[str, object]]:
        return [{"node": f"n{number}-{n}", "time": number * 86400.0, "job": "7"} for n in range(count)]

    assert refuse(["n"], 2048, day(0, 19), "7", 0.0) is None
    assert refuse(["n"], 2048, day(0, 20), "7", 0.0) == "the run would avoid 21 nodes within a day, 20 are allowed"
    month = [record for number in range(16) for record in day(2 * number, 2)]
    assert refuse(["n"], 64, month, "7", 29.9 * 86400) == "the run would avoid 33 nodes within a month, 32 are allowed"
    assert refuse(["n"], 64, month, "7", 30.1 * 86400) is None


def test_an_excluded_node_is_avoided_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = JobFolder(tmp_path)
    assert exclude(folder, {"n3": "ECC"}, 4) is None
    since = folder.excluded()[0]["time"]
    assert avoided(folder) == ["n3"]
    assert avoided(folder, since + AVOIDED_SECONDS - 1) == ["n3"]
    assert avoided(folder, since + AVOIDED_SECONDS + 1) == []
    refusal = exclude(folder, {"n3": "ECC"}, 4)
    assert refusal and "given to it again" in refusal, "without an end, if Slurm does not heed it"
    assert exclude(folder, {"n3": "ECC"}, 4, since + AVOIDED_SECONDS + 1) is None, "it had its chance"
    assert to_avoid(folder, ["n3", "n9"], since + 1) == {"n3", "n9"}
    assert to_avoid(folder, ["n3", "n9"], since + 2 * AVOIDED_SECONDS) == {"n9"}, "the job was submitted to avoid it"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert exclude(folder, {"n3": "ECC"}, 4) is None
    assert exclude(folder, {"n1": "ECC", "n2": "ECC"}, 4) == "2 of 4 nodes are bad, and one start may exclude 1"


def test_a_node_that_somebody_has_written_by_hand_stays_avoided(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.path.mkdir()
    (folder.path / "exclude.jsonl").write_text('{"node": "n7"}\n')
    assert exclude(folder, {"n8": "no memory"}, 8) is None
    assert avoided(folder) == ["n7", "n8"]
    assert avoided(folder, now=1e12) == ["n7"]


def test_the_exit_code_and_the_policys_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    cases = {
        GOOD: Verdict(NODES, 12, warnings=["slow"]),
        FAILED: Verdict(NODES, 12, exchange=["a link"]),
        STOP: Verdict(NODES, 12, shared=["no data"], bad={"n1": ["ECC"]}),
        AVOID: Verdict(NODES, 12, bad={"n1": ["ECC", "slow"]}),
    }
    for code, verdict in cases.items():
        run = tmp_path / str(code)
        assert conclude(verdict, JobFolder(run)) == (code, None)
        failures = JobFolder(run).rank_failures("7", 0)
        assert [failure.mistake for failure in failures] == ([] if code == GOOD else [code == STOP])
        assert [record["reason"] for record in JobFolder(run).excluded()] == (["ECC; slow"] if code == AVOID else [])
    too_many = Verdict(NODES, 12, bad={"n1": ["ECC"], "n2": ["ECC"]})
    assert conclude(too_many, JobFolder(tmp_path)) == (STOP, "2 of 12 nodes are bad, and one start may exclude 1")
    assert conclude(too_many, None)[0] == STOP


def test_slurms_placement_is_read() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("2") == [2]
    assert tasks_per_node("") == []
    assert planned_nodes({}) == []
