"""What goes wrong in a run is seen, said and answered by all ranks alike."""

import hashlib
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.checkpoint.checkpoint import RNG
from pretrain.report.report import write_report
from pretrain.run.checkpoint_folder import step_path
from pretrain.run.journal import Record, read, series
from pretrain.run.run_summary import load, verdict
from pretrain.tracking.follower import sync
from tests.checkpoints import manifest_of, write_manifest
from tests.conftest import RanksFailed
from tests.faults.tracked import assert_mirrors, run_of
from tests.runs import SMALL, attempts, duet

Ranks = Callable[..., list[Any]]
CASES = "tests.distributed.health_cases:"
GLOBAL_BATCH = 8
STEPS, LOG_EVERY, SAVE_EVERY = 24, 4, 6
ALL_STAGES = [(0, "fp32"), (1, "bf16"), pytest.param(2, "fp32", marks=pytest.mark.drill), (3, "bf16")]
QUICK_AND_DRILL = [
    pytest.param(0, "fp32", marks=pytest.mark.drill),
    pytest.param(1, "fp32", marks=pytest.mark.drill),
    pytest.param(1, "bf16", marks=pytest.mark.drill),
    pytest.param(2, "fp32", marks=pytest.mark.drill),
    pytest.param(2, "bf16", marks=pytest.mark.drill),
    pytest.param(3, "fp32", marks=pytest.mark.drill),
    (3, "bf16"),
]


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    """Each rank has 4 sequences a step, in two micro-batches."""
    return [
        *SMALL,
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        f"train.steps={STEPS}",
        f"train.log_every={LOG_EVERY}",
        f"train.checkpoint_every={SAVE_EVERY}",
        "train.eval_every=100",
        "train.keep_checkpoints=9",
        "batch.micro_batch=2",
        *more,
    ]


def events(run_dir: Path, kind: str) -> list[Record]:
    return [record for record in read(run_dir / "metrics.jsonl") if record.kind == kind]


def learned(run_dir: Path) -> dict[int, float]:
    """The loss of each step that counts."""
    return {point.step: point.value for point in series(read(run_dir / "metrics.jsonl"))["loss/total"]}


def final_hashes(run_dir: Path, step: int = STEPS) -> list[str]:
    """Of each shard's parameters and moments; the generators' states differ with all that was ever drawn."""
    hashes = []
    for file in sorted((run_dir / "checkpoints" / f"step-{step:09d}").glob("shard-*")):
        tensors = load_file(file)
        content = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors) if not name.startswith(RNG))
        hashes.append(hashlib.sha256(content).hexdigest())
    assert hashes
    return hashes


NOT_FINITE = {"nan_loss": [21], "nan_gradient": [37]}
"""Samples of rank 1, in the second micro-batch of steps 3 and 5."""


@pytest.mark.parametrize(("stage", "precision"), ALL_STAGES)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_traced(
    ranks: Ranks, dataset: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    args = arguments(dataset, tmp_path / "run", f"engine.zero_stage={stage}", f"engine.precision={precision}")
    ranks(f"{CASES}run", 2, args=[*args, "train.steps=8"], **NOT_FINITE)
    [(_, steps)] = attempts(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, metrics in steps.items() if "optim/skipped" in metrics] == [3, 5]
    first, second = events(tmp_path / "run", "skipped")
    assert (first.fields["steps"], second.fields["steps"]) == ([3], [5])
    [[loss], [gradient]] = [event.fields["diagnoses"][0]["findings"] for event in (first, second)]
    where = {"rank": 1, "host": platform.node(), "micro_batch": 2}
    assert loss.items() >= (where | {"samples": [21, 23], "loss": "nan"}).items()
    assert "token_embed.weight" in loss["parameters"]
    assert len(loss["parameters"]) > 5
    assert gradient.items() >= (where | {"samples": [37, 39], "parameters": ["final_norm.weight"]}).items()
    assert 0 < float(gradient["loss"]) < 10
    assert "1 of 3 step(s) up to step 4 applied no update; not finite at step 3: rank 1 on" in first.fields["text"]
    assert f"last finite: loss {steps[4]['loss/train']:.4f} and gradient norm" in first.fields["text"]


@pytest.mark.drill
@pytest.mark.parametrize(("stage", "precision"), QUICK_AND_DRILL)
def test_looking_closer_changes_nothing(
    ranks: Ranks, dataset: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    made = []
    for sabotage in (None, "look at nothing again"):
        run_dir = tmp_path / str(sabotage)
        args = arguments(dataset, run_dir, f"engine.zero_stage={stage}", f"engine.precision={precision}")
        ranks(f"{CASES}run", 2, args=[*args, "train.steps=8"], sabotage=sabotage, **NOT_FINITE)
        made.append((str(learned(run_dir)), final_hashes(run_dir, 8)))  # nan is not nan, but 'nan' is
        found = [len(d["findings"]) for e in events(run_dir, "skipped") for d in e.fields["diagnoses"]]
        assert found == ([0, 0] if sabotage else [1, 1])
    assert made[0] == made[1]


def test_a_run_that_diverged_ends_with_a_diagnosis_and_code_2(dataset: Path, tmp_path: Path) -> None:
    """A real divergence, by the real command line."""
    args = arguments(dataset, tmp_path / "run", "optimizer.lr=1e30", "health.max_skipped=3", "schedule.warmup_steps=0")
    done = duet("train", *args, "--ranks", "2")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the gradients were not finite 3 steps in a row, up to step 4: the run has diverged" in done.stderr
    assert f"first at step 2: rank 0 on {platform.node()}, micro-batch 1, samples 8, 10: loss nan" in done.stderr
    assert "and 1 other rank(s)" in done.stderr
    assert "last finite: loss" in done.stderr
    assert "at step 1" in done.stderr
    assert "every rank has it: start a new run with a lower optimizer.lr" in done.stderr


HARMFUL = 105
"""Rank 1 computes it in step 14, which logging looks at after step 16; the newest checkpoint is of step 12 then."""


def spiked(dataset: Path, run_dir: Path, answer: str, *more: str) -> list[str]:
    return arguments(dataset, run_dir, f"health.on_spike={answer}", "health.spike_window=8", *more)


@pytest.fixture(scope="module")
def warned(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one spike that has no consequence."""
    run_dir = tmp_path_factory.mktemp("health") / "run"
    ranks(f"{CASES}run", 2, args=spiked(dataset, run_dir, "warn"), spike=[HARMFUL])
    return run_dir


def test_a_spike_is_told_with_its_samples(warned: Path) -> None:
    [event] = events(warned, "spike")
    [spike] = event.fields["spikes"]
    assert event.step == spike["step"] == 14
    assert spike["z"] > 6
    assert "loss spike at step 14, samples 104 to 111: " in event.fields["text"]
    points = load(warned).points
    assert "optim/skipped" not in points, "warned only"
    assert [(p.step, p.value) for p in points["health/spikes"]] == [(16, 1), (18, 1), (20, 1), (24, 1)]
    assert event.fields["text"] in write_report([warned], None).read_text()


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.drill), 1, 3])
def test_a_spike_s_update_is_left_out(ranks: Ranks, dataset: Path, tmp_path: Path, stage: int, warned: Path) -> None:
    """Up to the spike the guard changes no bit; that step alone has no effect."""
    ranks(
        f"{CASES}run", 2, args=spiked(dataset, tmp_path / "skip", "skip", f"engine.zero_stage={stage}"), spike=[HARMFUL]
    )
    guarded, free = learned(tmp_path / "skip"), learned(warned)
    if stage == 1:
        assert [guarded[step] for step in range(1, 15)] == [free[step] for step in range(1, 15)]
        assert guarded[15] != free[15]
    assert guarded[14] > guarded[13] + 1
    [(_, steps)] = attempts(tmp_path / "skip" / "metrics.jsonl")
    assert [step for step, metrics in steps.items() if "optim/skipped" in metrics] == [14]
    [skipped] = events(tmp_path / "skip", "skipped")
    assert (skipped.fields["steps"], skipped.fields["diagnoses"]) == ([14], []), "nothing was not finite"
    [spike] = events(tmp_path / "skip", "spike")
    assert spike.fields["text"].endswith("no update was applied")


def test_nothing_waits_for_the_device_to_find_a_spike(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = spiked(dataset, tmp_path / "run", "skip")
    for found in ranks("tests.distributed.cases:host_waits", 2, args=args):
        assert found == ["distributed.py:largest"]


def continued_by_hand(run_dir: Path, step: int, samples_seen: int) -> None:
    """Leave of a run its checkpoint of a step, as if the data had stood elsewhere then."""
    (run_dir / "metrics.jsonl").unlink()
    for path in (run_dir / "checkpoints").iterdir():
        if path.name != f"step-{step:09d}":
            shutil.rmtree(path)
    folder = step_path(run_dir / "checkpoints", step)
    manifest = manifest_of(folder)
    manifest["state"]["data"] |= {"samples_seen": samples_seen, "tokens_seen": samples_seen * 16}
    write_manifest(folder, manifest)


@pytest.mark.parametrize(("stage", "precision"), QUICK_AND_DRILL)
def test_after_a_rollback_the_run_is_as_if_it_had_read_other_data(
    ranks: Ranks, dataset: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    run_dir, by_hand = tmp_path / "run", tmp_path / "by-hand"
    more = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    ranks(f"{CASES}run", 2, args=spiked(dataset, run_dir, "rollback", *more), spike=[HARMFUL])
    [rollback] = events(run_dir, "rollback")
    assert (rollback.step, rollback.fields["resumed_from"]) == (16, 12)
    assert rollback.fields["data"]["samples_seen"] == 16 * GLOBAL_BATCH

    shutil.copytree(run_dir, by_hand)
    continued_by_hand(by_hand, 12, 16 * GLOBAL_BATCH)
    ranks(f"{CASES}run", 2, args=spiked(dataset, by_hand, "warn", *more))
    expected = learned(by_hand)
    if (stage, precision) == (1, "bf16"):  # the proof can fail
        sabotaged = spiked(dataset, tmp_path / "sabotaged", "rollback", *more)
        ranks(f"{CASES}run", 2, args=sabotaged, spike=[HARMFUL], sabotage="go back but keep the weights")
        assert final_hashes(tmp_path / "sabotaged") != final_hashes(by_hand)
    assert sorted(expected) == list(range(13, STEPS + 1))
    assert {step: loss for step, loss in learned(run_dir).items() if step > 12} == expected
    assert final_hashes(run_dir) == final_hashes(by_hand)


def test_a_rollback_outlives_a_crash_and_is_told_everywhere(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    """Killed after going back two checkpoints, before the next one: the next attempt goes on behind the spike."""
    run_dir, whole = tmp_path / "runs" / "run", tmp_path / "whole"
    more = ["health.rollback_checkpoints=2", "tracking.mode=offline"]
    ranks(f"{CASES}run", 2, args=spiked(dataset, whole, "rollback", *more), spike=[HARMFUL])
    args = spiked(dataset, run_dir, "rollback", *more)
    with pytest.raises(RanksFailed, match="-9"):
        ranks(f"{CASES}run", 2, args=args, spike=[HARMFUL], killed_by=16 * GLOBAL_BATCH + 9)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-000000001", "step-000000006"]
    shutil.copytree(run_dir, tmp_path / "phase")
    [summary, silent] = ranks(f"{CASES}run", 2, args=args, spike=[HARMFUL])
    assert ["health", "loss spikes: 1, rollbacks: 1; see the report"] in summary
    assert silent == []
    assert [start.fields["resumed_from"] for start in events(run_dir, "start")] == [None, 6]
    assert learned(run_dir) == learned(whole)
    assert final_hashes(run_dir) == final_hashes(whole)

    seen = series(read(run_dir / "metrics.jsonl"))["data/samples_seen"]
    assert [p.value / GLOBAL_BATCH for p in seen] == [*range(1, 7), *range(17, 17 + 18)], "no superseded point"
    goodput = [
        record.metrics["time/goodput"] for record in read(run_dir / "metrics.jsonl") if "time/goodput" in record.metrics
    ]
    assert all(0 < share < 1 for share in goodput)
    run = load(run_dir)
    assert "resumed once, rolled back once" in verdict(run)[0]
    assert [w.kind for w in run.warnings if w.kind != "warning"] == ["spike", "rollback"]

    synced = sync(run_dir)
    assert synced.status == "FINISHED"
    assert_mirrors(run_dir)
    client_metrics = run_of(run_dir).data.metrics
    assert client_metrics["training health/rollbacks"] == client_metrics["training health/spikes"] == 1

    changed = ["data.order=block", "data.phase=2", *more]
    ranks(f"{CASES}run", 2, args=spiked(dataset, tmp_path / "phase", "rollback", *changed))
    data = manifest_of(step_path(tmp_path / "phase" / "checkpoints", STEPS))["state"]["data"]
    assert [(p["start"] / GLOBAL_BATCH, p["order"]) for p in data["phases"]] == [(0, "global"), (16, "block")]
    assert data["samples_seen"] == (16 + STEPS - 6) * GLOBAL_BATCH


def test_a_run_that_spikes_again_after_its_rollbacks_ends(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = spiked(dataset, tmp_path / "run", "rollback", "health.max_rollbacks=1")
    message = r"the loss spiked again, to .* at step 14 .* after 1 rollback\(s\)"
    with pytest.raises(RanksFailed, match=message):
        ranks(f"{CASES}run", 2, args=args, spike=[HARMFUL, 16 * GLOBAL_BATCH + 9])


@pytest.mark.drill
def test_an_ordinary_run_has_no_spikes_and_no_other_complaints(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    """From scratch until it has learned, with the default threshold and window."""
    args = arguments(dataset, tmp_path / "run", "train.steps=200", "train.log_every=20", "train.checkpoint_every=200")
    ranks(f"{CASES}run", 1, args=args)
    losses = learned(tmp_path / "run")
    assert losses[200] < losses[1] - 0.5
    assert load(tmp_path / "run").warnings == []


def test_all_ranks_collect_garbage_at_the_same_steps(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", "train.steps=13", "health.gc_every=5")
    for result in ranks(f"{CASES}collections", 2, args=args):
        assert result == {"steps": [5, 10], "before": True, "after": True, "frozen": 0}


def test_a_frozen_rank_shows_in_the_stacks_of_the_others(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", "train.steps=8", f"health.hang_minutes={0.7 / 60}")
    text = ranks(f"{CASES}frozen", 2, args=args, at=5, thaw=True)[0]
    assert [e for e in events(tmp_path / "run", "hang") if "rank 0" in e.fields["text"] and e.step == 5]
    why, _, where = text.partition("after step 5\n")
    assert "rank 0 on" in why
    assert "agreed_request" in where, "the main thread, in a collective of gloo's"
    assert "all_reduce" in where
    assert sorted(learned(tmp_path / "run")) == list(range(1, 9)), "it went on"


def test_a_rank_that_stays_frozen_ends_the_run_with_stacks(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", f"health.hang_minutes={1 / 60}")
    with pytest.raises(RanksFailed, match="(?s)exit codes \\[1, -9\\].*stacks of rank 0"):
        ranks(f"{CASES}frozen", 2, args=args, at=2, thaw=False)
    text = "".join(file.read_text() for file in (tmp_path / "run" / "logs").glob("stacks-rank-0-*.txt"))
    assert "rank 0 on" in text
    assert "the run ended with:" in text
    assert [end.fields["status"] for end in events(tmp_path / "run", "end")] == ["FAILED"]


def test_stacks_are_written_even_when_python_s_lock_is_never_given_away(ranks: Ranks, tmp_path: Path) -> None:
    ranks(f"{CASES}never_gives_the_lock_away", 1, logs=str(tmp_path))


def test_a_rank_that_lags_and_leaks_is_named(ranks: Ranks, dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", "train.steps=16", "train.log_every=1")
    ranks(f"{CASES}leaking", 2, args=args, slow=0.05, leak_mib=40)
    straggler = events(tmp_path / "run", "straggler")[0]
    assert straggler.fields["text"].startswith(f"rank 1 on {platform.node()} holds up the others")
    [growth] = events(tmp_path / "run", "growth")
    assert growth.fields["text"].startswith("memory of the process keeps growing: ")
