"""SIGKILL of a launcher, or of a rank, at any moment: started again and again, a run learns what an unkilled one does.

The journal is read here by its lines, not by the code that the run itself goes on with.
"""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.runs import SMALL, duet, kill, ranks_of, start_duet, wait_until_gone

KILLS, STEPS = int(os.environ.get("DRILL_KILLS", "30")), 240
NAMES = ("loss/total", "loss/train", "penalty/entropy", "penalty/l1", "optim/grad_norm", "data/samples_seen")


def merged(journal: Path) -> dict[int, dict[str, Any]]:
    """The steps that count, by number. Raises AssertionError if one is missing, is out of turn, or counts twice."""
    steps: dict[int, dict[str, Any]] = {}
    for line in journal.read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        if record["kind"] == "start":
            steps = {step: values for step, values in steps.items() if step <= (record["resumed_from"] or 0)}
            assert len(steps) == (record["resumed_from"] or 0), "a step before the checkpoint is missing"
        elif record["kind"] == "metrics" and "loss/train" in record["metrics"]:
            assert record["step"] == len(steps) + 1, f"step {record['step']} after {len(steps)} steps"
            steps[record["step"]] = {name: record["metrics"][name] for name in NAMES}
    return steps


def taken(journal: Path) -> list[tuple[int, dict[str, Any]]]:
    """All steps of all attempts, those that were taken again included."""
    records = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    found = [(r["step"], r["metrics"]) for r in records if r["kind"] == "metrics" and "loss/train" in r["metrics"]]
    return [(step, {name: metrics[name] for name in NAMES}) for step, metrics in found]


def tensors(run_dir: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's weights and moments, and of torch's generator. Nothing draws from the others."""
    found = {}
    for file in (run_dir / "checkpoints" / f"step-{STEPS:09d}").glob("*.safetensors"):
        for name, values in load_file(file).items():
            if name not in ("rng/python", "rng/numpy"):
                found[f"{file.name} {name}"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return found


def last_step(journal: Path) -> int:
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return max((json.loads(line).get("step") or 0 for line in lines[-20:]), default=0)


def wait_for_moment(chance: random.Random, run_dir: Path, process: Any) -> str:
    """Somewhere in the start of the programs, or in one of the next steps; in words."""
    begin, deadline = last_step(run_dir / "metrics.jsonl"), time.monotonic() + 240
    if chance.random() < 0.25:
        moment = time.monotonic() + chance.uniform(0.1, 6.0)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.005)
        return "by the clock"
    lines = (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if begin else 0
    more = lines + chance.randrange(1, 18)
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_bytes().count(b"\n") >= more:
            break
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.02))
    return "in its steps"


@pytest.mark.drill
def test_a_run_that_is_killed_thirty_times_is_the_run_that_was_not(dataset: Path, tmp_path: Path) -> None:
    def command(run_dir: Path) -> list[str]:
        steps = [f"train.steps={STEPS}", "train.checkpoint_every=4", "train.eval_every=60", "train.keep_checkpoints=2"]
        return ["train", *SMALL, f"data.path={dataset}", f"run.dir={run_dir}", *steps, "--ranks", "2"]

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    done = duet(*command(whole))
    assert done.returncode == 0, done.stderr
    expected = merged(whole / "metrics.jsonl")
    assert sorted(expected) == list(range(1, STEPS + 1))
    seed = int(os.environ.get("DRILL_SEED", "30"))
    chance, kills = random.Random(seed), dict[str, int]()
    while sum(kills.values()) < KILLS:
        process = start_duet(*command(run_dir), log=tmp_path / "log", new=True)
        moment = wait_for_moment(chance, run_dir, process)
        alive = ranks_of(run_dir)
        assert process.poll() is None, f"it ended before it was killed: {(tmp_path / 'log').read_text()[-2000:]}"
        victim = chance.choice(["the launcher", "a rank"]) if alive else "the launcher"
        if victim == "a rank":
            os.kill(chance.choice(alive), signal.SIGKILL)
            assert process.wait(120) != 0
        else:
            kill(process)
        wait_until_gone(run_dir)
        kills[f"{victim} {moment}"] = kills.get(f"{victim} {moment}", 0) + 1
    reached = last_step(run_dir / "metrics.jsonl")
    done = duet(*command(run_dir))
    assert done.returncode == 0, done.stderr
    steps = taken(run_dir / "metrics.jsonl")
    for step, values in steps:
        assert values == expected[step], f"step {step} differs"
    assert merged(run_dir / "metrics.jsonl") == expected
    assert len(tensors(whole)) >= 8
    assert tensors(run_dir) == tensors(whole)
    print(
        f"\ndrill: seed {seed}: {KILLS} kills ({kills}), at step {reached} after them; {STEPS} steps bit for bit, "
        f"{len(steps) - STEPS} of them taken again, no step missing or counted twice, last checkpoint equal"
    )


def test_the_comparer_finds_what_is_missing_or_counted_twice(tmp_path: Path) -> None:
    def journal(*steps: int | None) -> Path:
        """A start that goes on from -n for a negative number, a start from scratch for None."""
        lines: list[dict[str, Any]] = []
        for step in steps:
            if step is None or step < 0:
                lines.append({"kind": "start", "resumed_from": -step if step else None})
            else:
                lines.append({"kind": "metrics", "step": step, "metrics": dict.fromkeys(NAMES, float(step))})
        (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / "journal"

    assert sorted(merged(journal(None, 1, 2, 3, -2, 3, 4))) == [1, 2, 3, 4]
    for steps in ((None, 1, 3), (None, 1, 2, 2), (None, 1, -2, 3), (None, 1, 2, -2, 2)):
        with pytest.raises(AssertionError):
            merged(journal(*steps))
