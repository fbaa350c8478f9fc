"""The promise of the whole: killed at any step and started again, a run ends as if nothing had happened."""

import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from pretrain.run.journal import read
from tests.conftest import RanksFailed
from tests.runs import (
    SMALL,
    attempts,
    check_resumed,
    duet,
    kill,
    newest_on_disk,
    ranks_of,
    start_duet,
    wait_for_step,
    wait_until_gone,
)

Ranks = Callable[..., list[Any]]
STEPS, INTERVAL = 24, 5


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        f"train.steps={STEPS}",
        f"train.checkpoint_every={INTERVAL}",
        "train.eval_every=12",
        *more,
    ]


@pytest.fixture(scope="module")
def reference(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run that was never interrupted: ZeRO 1, two ranks, fp32, noise on."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, run_dir))
    [(resumed_from, steps)] = attempts(run_dir / "metrics.jsonl")
    assert resumed_from is None
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert 0 < steps[STEPS]["gate/density"] < 1, "the noise is on"
    assert steps[STEPS]["loss/train"] < steps[1]["loss/train"]
    return run_dir / "metrics.jsonl"


def test_killed_at_a_random_step_and_started_again(
    dataset: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real command line: SIGKILL to the launcher ends every rank, and the same command goes on."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for number in itertools.count():
        run_dir = tmp_path / f"it's run {number} & more"
        command = ["train", *arguments(dataset, run_dir), "--ranks", "2"]
        step = random.Random().randrange(INTERVAL + 1, STEPS - 2)
        print(f"killed at step {step}")
        process = start_duet(*command, log=tmp_path / "log", new=True)
        wait_for_step(run_dir / "metrics.jsonl", step, process)
        alive = ranks_of(run_dir)
        kill(process)
        wait_until_gone(run_dir)
        if max(attempts(run_dir / "metrics.jsonl")[0][1]) < STEPS:
            break
        assert number < 9, "each time the run was over before it was killed"
    assert len(alive) == 2
    assert not list(temporary.rglob("store")), "nothing of the ranks' meeting is left behind"
    newest = newest_on_disk(run_dir)
    assert newest, "there was a checkpoint"
    done = duet(*command)
    assert done.returncode == 0, done.stderr
    assert check_resumed(run_dir / "metrics.jsonl", reference, INTERVAL, [newest]) == 2
    assert f"step {STEPS} of {STEPS}" in done.stdout
    [resume] = [line for line in done.stdout.splitlines() if line.startswith("resume ")]
    assert shlex.split(resume)[2:] == ["train", str(run_dir / "config.yaml"), "--ranks", "2"]


@pytest.mark.parametrize("step", [23, *(pytest.param(step, marks=pytest.mark.drill) for step in (1, 4, 6, 8, 11))])
def test_killed_at_each_kind_of_step(ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path, step: int) -> None:
    """Rank 1 is killed in the middle of a step; twice, so that a resumed run is killed, too."""
    run_dir = tmp_path / "run"
    args = arguments(dataset, run_dir)
    on_disk = []
    for deadly in (step, step + 1):
        if deadly < STEPS:
            with pytest.raises(RanksFailed, match="-9"):
                ranks("tests.distributed.cases:train_run", 2, args=args, die_at=deadly)
            on_disk.append(newest_on_disk(run_dir))
    ranks("tests.distributed.cases:train_run", 2, args=args)
    assert check_resumed(run_dir / "metrics.jsonl", reference, INTERVAL, on_disk) == len(on_disk) + 1
    if step >= 2 * INTERVAL:
        assert min(found or 0 for found in on_disk) >= INTERVAL, "a save that has to wait for the one before"


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param("load nothing", marks=pytest.mark.drill),
        pytest.param("find nothing", marks=pytest.mark.drill),
        "forget the data position",
        "forget the moments",
    ],
)
def test_the_proof_of_resuming_fails_when_loading_is_sabotaged(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path, sabotage: str
) -> None:
    args = arguments(dataset, tmp_path / "run")
    with pytest.raises(RanksFailed, match="-9"):
        ranks("tests.distributed.cases:train_run", 2, args=args, die_at=12)
    on_disk = newest_on_disk(tmp_path / "run")
    ranks("tests.distributed.cases:train_run", 2, args=args, sabotage=sabotage)
    with pytest.raises(AssertionError, match="differs|not from the newest"):
        check_resumed(tmp_path / "run" / "metrics.jsonl", reference, INTERVAL, [on_disk])


def test_resumed_on_another_number_of_ranks_and_stage(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    args = arguments(dataset, tmp_path / "run")
    with pytest.raises(RanksFailed, match="-9"):
        ranks("tests.distributed.cases:train_run", 2, args=args, die_at=12)
    on_disk = newest_on_disk(tmp_path / "run")
    ranks("tests.distributed.cases:train_run", 1, args=[*args, "engine.zero_stage=3", "batch.micro_batch=2"])
    [_, (resumed_from, steps)] = attempts(tmp_path / "run" / "metrics.jsonl")
    [(_, expected)] = attempts(reference)
    assert resumed_from == on_disk
    assert on_disk in (5, 10)
    for step, metrics in steps.items():
        # The same data, weights and noise; sums are taken in another order, and a rounding that flips costs a little.
        assert metrics["loss/total"] == pytest.approx(expected[step]["loss/total"], abs=1e-3)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.drill) for number in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_saves_and_the_next_start_goes_on(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path, number: int
) -> None:
    args = arguments(dataset, tmp_path / "run")
    [received, other] = ranks("tests.distributed.cases:train_run", 2, args=args, signal_at=[7, number])
    assert received == other == number
    ranks("tests.distributed.cases:train_run", 2, args=args)
    [(_, first), (resumed_from, second)] = attempts(tmp_path / "run" / "metrics.jsonl")
    [(_, expected)] = attempts(reference)
    assert max(first) == resumed_from == 7
    assert {s: m["loss/total"] for s, m in (first | second).items()} == {
        s: m["loss/total"] for s, m in expected.items()
    }
    ends = [r.fields["status"] for r in read(tmp_path / "run" / "metrics.jsonl") if r.kind == "end"]
    assert ends == ["KILLED", "FINISHED"]


def test_two_starts_on_one_run_folder_cannot_both_train(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["train", *arguments(dataset, run_dir, "train.steps=100000", "train.checkpoint_every=50000")]
    process = start_duet(*command, log=tmp_path / "log")
    try:
        wait_for_step(run_dir / "metrics.jsonl", 1, process)
        second = duet(*command)
        assert second.returncode == 2
        assert "another start owns this run folder (attempt 1: process" in second.stderr
        assert "Traceback" not in second.stderr
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    assert ranks_of(run_dir) == []


def test_a_finished_run_says_so_and_changes_nothing(ranks: Ranks, dataset: Path, reference: Path) -> None:
    run_dir = reference.parent
    before = sorted(str(path) for path in (run_dir / "checkpoints").rglob("*"))
    done = duet("train", *arguments(dataset, run_dir))
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS} of {STEPS}" in done.stdout
    assert sorted(str(path) for path in (run_dir / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["optimizer.lr=0.02"], "optimizer.lr: 0.01 in the run, 0.02 now"),
        (["data.path=/nowhere"], "/nowhere is not a dataset"),
        (["train.stpes=3"], "nearest valid key: train.steps"),
        (["batch.tokens=48"], "which 2 ranks cannot share evenly"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(
    dataset: Path, reference: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    done = duet("train", *arguments(dataset, reference.parent), *change, "--ranks", "2")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_using_a_finished_run(dataset: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = str(reference.parent)
    validated = duet("eval", run_dir)
    assert validated.returncode == 0, validated.stderr
    recorded = [r.metrics["loss/val"] for r in read(reference) if "loss/val" in r.metrics][-1]
    found = re.search(r"^loss/val +(\S+)", validated.stdout, re.MULTILINE)
    assert found and float(found[1]) == pytest.approx(recorded, abs=1e-5), "the same on another number of ranks"
    listed = here("checkpoint", "ls", run_dir)
    assert [line.split("step ")[1].split()[0] for line in listed.splitlines()] == ["24", "20", "15"]
    assert "token_embed.weight" in here("checkpoint", "inspect", run_dir)
    assert here("checkpoint", "verify", run_dir).count("whole") == 3
    here("report", run_dir, "--out", str(tmp_path / "r.html"))
    assert "<html" in (tmp_path / "r.html").read_text()
    plan = here("train", *arguments(dataset, tmp_path / "new"), "--dry-run", "--ranks", "2")
    assert "2 rank(s) x 1 x 4 sequences" in plan
    assert not (tmp_path / "new").exists()


def here(*words: str) -> str:
    """What a command prints, run in this process: the imports are done."""
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_validation_does_not_depend_on_the_number_of_ranks(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    """Of two: test_using_a_finished_run."""
    results = []
    for world in (1, 4):
        run_dir = tmp_path / str(world)
        args = arguments(dataset, run_dir, "train.steps=1", "optimizer.lr=1e-9")
        ranks("tests.distributed.cases:train_run", world, args=args)
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        results.append([r["metrics"]["loss/val"] for r in records if "loss/val" in r.get("metrics", {})][-1])
    assert results == pytest.approx([results[0]] * 2, abs=1e-6)


@pytest.mark.drill
@pytest.mark.parametrize("delay", [0.5, 2.5])
def test_ctrl_c_while_starting_up_is_clean(dataset: Path, tmp_path: Path, delay: float) -> None:
    """The delay only spreads the interrupts over interpreter start, imports and opening; each must end alike."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = ["train", *arguments(dataset, run_dir, "train.steps=100000"), "--ranks", "2"]
    process = start_duet(*command, log=log, new=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3 + delay)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(120) == 130
    finally:
        process.kill()
    wait_until_gone(run_dir)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("moment", [pytest.param("starting", marks=pytest.mark.drill), "training"])
def test_a_rank_that_dies_ends_the_run_with_a_word_about_it(dataset: Path, tmp_path: Path, moment: str) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start_duet("train", *arguments(dataset, run_dir, "train.steps=100000"), "--ranks", "2", log=log)
    if moment == "training":
        wait_for_step(run_dir / "metrics.jsonl", 1, process)
    end = time.monotonic() + 30
    while not (pids := ranks_of(run_dir, rank=1)):
        assert time.monotonic() < end, "rank 1 did not start"
        time.sleep(0.01)
    os.kill(pids[0], signal.SIGKILL)
    assert process.wait(120) != 0
    assert ranks_of(run_dir) == []
    assert "rank 1 ended with code -9" in log.read_text()


def test_a_run_that_was_taken_over_stops_and_writes_nothing_more(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RanksFailed, match="taken over by another start"):
        ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, run_dir), taken_over_at=7)
    records = list(read(run_dir / "metrics.jsonl"))
    assert max(r.step or 0 for r in records) <= 8
    assert not [r for r in records if r.kind == "end"]
    assert not (run_dir / "checkpoints" / "step-000000010").exists()


def test_the_gates_of_a_validation_do_not_depend_on_its_batches(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    results = ranks("tests.distributed.cases:validate_in_batches_of", 1, run=str(reference.parent), sizes=[1, 7, 10000])
    [[first, *others]] = results
    assert 0 < first["gate/val_density"] < 1
    for other in others:
        assert other == pytest.approx(first, abs=1e-3)  # what pads the very last window


def test_without_its_checkpoints_a_run_does_not_start_over(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run")
    ranks("tests.distributed.cases:train_run", 2, args=args, signal_at=[7, signal.SIGTERM])
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RanksFailed, match="the journal tells of a checkpoint of step 7"):
        ranks("tests.distributed.cases:train_run", 2, args=args)


def test_checkpoints_of_another_run_are_refused(ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference.parent / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(RanksFailed, match=r"of a run with run\.seed=1337; this one has run\.seed=99"):
        ranks("tests.distributed.cases:train_run", 2, args=arguments(dataset, tmp_path / "run", "run.seed=99"))


@pytest.mark.drill
def test_a_closed_pipe_does_not_stop_training(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "launch.cli", "train", *arguments(dataset, run_dir)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout
    process.stdout.close()
    assert process.wait(120) == 0
    assert max(attempts(run_dir / "metrics.jsonl")[0][1]) == STEPS
