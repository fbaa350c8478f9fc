"""Real ranks that are asked to stop at an awkward moment, or fail, in a job of Slurm (its environment is enough)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.checkpoint_folder import step_path
from pretrain.run.job_records import JobFolder
from pretrain.run.journal import read
from pretrain.run.run_listing import recorded_end, saved_steps
from pretrain.run.signals import KILL_SWITCH
from tests.checkpoints import manifest_of
from tests.conftest import RanksFailed
from tests.runs import ROOT, SMALL, attempts, newest_on_disk

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.life_cases:"
STEPS = 12
BATCH = 8


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    run = [f"data.path={dataset}", f"run.dir={run_dir}", f"train.steps={STEPS}"]
    return [*SMALL, *run, "train.checkpoint_every=5", "train.eval_every=6", *more]


def validations(run_dir: Path) -> list[tuple[int, int, float]]:
    """Attempt, step and loss of each."""
    records = list(read(run_dir / "metrics.jsonl"))
    return [(r.attempt, r.step or 0, r.metrics["loss/val"]) for r in records if "loss/val" in r.metrics]


@pytest.fixture(scope="module")
def reference(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("life") / "run"
    assert ranks(f"{CASES}run", 2, args=arguments(dataset, run_dir)) == [0, 0]
    return run_dir


def check_whole(run_dir: Path, reference: Path) -> None:
    """All attempts together did what the uninterrupted run did, bit for bit, validations included."""
    done: dict[int, dict[str, float]] = {}
    for _, steps in attempts(run_dir / "metrics.jsonl"):
        done |= steps
    [(_, expected)] = attempts(reference / "metrics.jsonl")
    for name in ("loss/total", "optim/grad_norm"):
        assert {s: m[name] for s, m in done.items()} == {s: m[name] for s, m in expected.items()}
    assert [found[1:] for found in validations(run_dir)] == [found[1:] for found in validations(reference)]


@pytest.mark.parametrize("step", [6, STEPS])
def test_the_planned_signal_breaks_off_a_validation_that_is_made_up_for(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path, step: int
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(dataset, run_dir, f"train.eval_every={step}")
    [[request, batches], other] = ranks(f"{CASES}signalled_in_validation", 2, args=args, at=2)
    assert request == other[0] == signal.SIGUSR1
    assert batches == other[1] == 2, "both stopped behind the batch in which one was signalled"
    assert validations(run_dir) == []
    assert newest_on_disk(run_dir) == step
    wish = JobFolder(run_dir).requeue_wish()
    assert wish
    assert (wish.step, wish.trained) == (step, step)
    assert ranks(f"{CASES}run", 2, args=args) == [0, 0]
    assert validations(run_dir)[0][:2] == (2, step)
    manifest = manifest_of(step_path(run_dir / "checkpoints", step))
    assert manifest["validation_loss"] == validations(run_dir)[0][2], "as of any that was validated"
    if step == 6:
        check_whole(run_dir, reference)
    assert ranks(f"{CASES}run", 2, args=args) == [0, 0], "once more"
    assert len([found for found in validations(run_dir) if found[1] == step]) == 1


def test_a_step_is_saved_before_its_validation_which_has_a_budget_but_at_the_end(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(
        dataset, run_dir, "train.checkpoint_every=6", "train.eval_tokens=0.64K", "train.keep_checkpoints=1"
    )
    [[checkpoint, state, batches], _] = ranks(f"{CASES}watched_in_validation", 2, args=args)
    assert (checkpoint, state) == (6, "validating")
    records = [r.metrics for r in read(run_dir / "metrics.jsonl") if "loss/val" in r.metrics]
    assert ["loss/val_part" in metrics for metrics in records] == [False, True]
    assert batches > 2 * 640 / 16 / 4 / 2, "all at the end"
    compared = [records[0]["loss/val"], records[1]["loss/val_part"]]
    kept = {step: manifest_of(step_path(run_dir / "checkpoints", step)) for step in saved_steps(run_dir)}
    assert kept[12]["validation_loss"] == compared[1]
    assert [*kept] == ([12] if compared[1] < compared[0] else [6, 12]), "the newest, and the best by what compares"
    beat = JobFolder(run_dir).last_heartbeat()
    assert beat and beat.validating is None


@pytest.mark.parametrize("step", [1, 8])
def test_the_planned_signal_while_data_stall(
    ranks: Ranks, dataset: Path, reference: Path, tmp_path: Path, step: int
) -> None:
    args = arguments(dataset, tmp_path / "run")
    assert ranks(f"{CASES}signalled_while_data_stall", 2, args=args, step=step) == [signal.SIGUSR1] * 2
    assert newest_on_disk(tmp_path / "run") == (step - 1 or None), "the step before the one without data"
    wish = JobFolder(tmp_path / "run").requeue_wish()
    assert wish
    assert (wish.step, wish.trained) == (step - 1, step - 1)
    assert ranks(f"{CASES}run", 2, args=args) == [0, 0]
    check_whole(tmp_path / "run", reference)


@pytest.mark.parametrize("mistake", [False, True])
def test_a_failing_rank_writes_down_what_the_policy_needs(
    ranks: Ranks, dataset: Path, tmp_path: Path, mistake: bool
) -> None:
    with pytest.raises(RanksFailed):
        ranks(f"{CASES}failing", 2, args=arguments(dataset, tmp_path / "run"), step=4, mistake=mistake)
    found = JobFolder(tmp_path / "run").rank_failures("7", 3)
    first = found[0]
    assert (first.rank, first.host, first.step, first.mistake) == (1, "n1", 4, mistake)
    assert first.what == ("the shard is damaged" if mistake else "ValueError: a bug")
    assert first.samples == [3 * BATCH, 4 * BATCH - 1]
    assert [f.rank for f in found] == [1, 0], "the peer lost its connection later"
    beat = JobFolder(tmp_path / "run").last_heartbeat()
    assert beat
    assert (beat.job, beat.restart) == ("7", 3)
    assert beat.step <= 3


def test_the_kill_switch_saves_and_wants_no_requeue(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(dataset, run_dir)
    assert ranks(f"{CASES}switched_off", 2, args=args, step=4) == [KILL_SWITCH] * 2
    assert newest_on_disk(run_dir) in (4, 5), "of both ranks, one may have been a step ahead"
    assert JobFolder(run_dir).requeue_wish() is None
    records = list(read(run_dir / "metrics.jsonl"))
    assert [r.fields["reason"] for r in records if r.kind == "end"] == ["kill switch"]
    [lead] = [r for r in records if r.kind == "lead"]
    assert "the planned signal comes 1e-06 s before the time limit, but a save took" in lead.fields["text"]
    beat = JobFolder(run_dir).last_heartbeat()
    assert beat
    assert beat.step == beat.checkpoint == newest_on_disk(run_dir)
    assert beat.loss in [r.metrics.get("loss/train") for r in records if r.step == beat.step]
    assert beat.tokens_per_second


def ends(run_dir: Path) -> list[tuple[str, int]]:
    """Status and exit code, as recorded."""
    found = [r.fields for r in read(run_dir / "metrics.jsonl") if r.kind == "end"]
    return [(fields["status"], fields["code"]) for fields in found]


@pytest.mark.parametrize(
    ("what", "at_end"),
    [*((what, True) for what in ("memory", "disk", "journal", "SIGINT", "SIGTERM", "SIGUSR1")), ("SIGINT", False)],
)
def test_nothing_after_the_end_makes_a_failure_of_a_run(
    ranks: Ranks, dataset: Path, tmp_path: Path, what: str, at_end: bool
) -> None:
    """The report fails, runs out of memory, or is broken off by a signal; the journal cannot be read."""
    run_dir = tmp_path / "run"
    status, request, code = ("FINISHED", 0, 0) if at_end else ("KILLED", int(signal.SIGINT), 130)
    args = arguments(dataset, run_dir, "train.steps=6")
    assert ranks(f"{CASES}reporting", 2, args=args, what=what, at_end=at_end) == [[request, code]] * 2
    assert ends(run_dir) == [(status, code)]
    assert newest_on_disk(run_dir) == (6 if at_end else 4)
    end = recorded_end(run_dir)
    assert end
    assert (end.finished, end.code) == (at_end, code)
    assert not (run_dir / "report.html").exists()
    assert "ended" in json.loads((run_dir / "attempts" / "000001.json").read_text()), "the folder is free"


def test_a_sample_that_fails_costs_nothing_but_itself(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(dataset, run_dir, "train.steps=6", "train.sample_tokens=4")
    assert ranks(f"{CASES}sampling", 2, args=args) == [0, 0]
    assert newest_on_disk(run_dir) == 6
    assert ends(run_dir) == [("FINISHED", 0)]
    [warning] = [r.fields["text"] for r in read(run_dir / "metrics.jsonl") if r.kind == "warning"]
    assert "no room for a cache" in warning


@pytest.mark.parametrize("dies", [False, True])
def test_ranks_wait_for_the_first_one_longer_than_for_a_collective(ranks: Ranks, dies: bool) -> None:
    first, *others = ranks(f"{CASES}waiting", 3, seconds=1.0, dies=dies)
    for waited, worked in others:
        assert waited > first[0] / 2
        assert worked < waited / 4, "the processor was left to others"


def test_the_children_of_a_rank_survive_the_planned_signal() -> None:
    """srun sends it to all processes of a step: a compiler that dies of it would be a crash."""
    program = (
        "import os, signal, subprocess, threading\n"
        "from pretrain.run.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "for pid in (child.pid, os.getpid()): os.kill(pid, signal.SIGUSR1)\n"
        "print(child.poll(), stop.signal, stop.signal)\n"
        "child.kill(); child.wait(); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-uc", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.stdout == "None 10 10\n", done.stderr


def test_steps_before_a_rollback_count_as_training(ranks: Ranks, tmp_path: Path) -> None:
    """A wish of a start without any would be taken for a failure."""
    assert ranks(f"{CASES}stopped_behind_its_start", 1, run_dir=str(tmp_path)) == [2]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("renamed", [True, False])
def test_a_run_whose_folder_is_renamed_or_removed_ends_and_makes_nothing_anew(
    ranks: Ranks, dataset: Path, tmp_path: Path, renamed: bool, again: bool
) -> None:
    """On every rank with the same words, and at the step of a save; what was moved is whole, and goes on."""
    moved, args = tmp_path / "moved", arguments(dataset, tmp_path / "run", "train.checkpoint_every=5")
    with pytest.raises(RanksFailed) as failed:
        ranks(f"{CASES}folder_lost_at", 2, args=args, step=5, to=str(moved) if renamed else None, again=again)
    assert str(failed.value).count("LeaseLost: ") >= 2
    assert "duet train FOLDER/config.yaml" in str(failed.value)
    assert not list(tmp_path.glob("run/**/*"))
    assert (tmp_path / "run").exists() == again
    if renamed:
        ranks(f"{CASES}run", 1, args=[str(moved / "config.yaml")])
        assert [record.fields["status"] for record in read(moved / "metrics.jsonl") if record.kind == "end"] == [
            "FINISHED"
        ]
