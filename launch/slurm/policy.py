"""Whether a job runs again once its ranks have ended: the batch script asks, this decides, says why, and keeps count.

    python -P -m launch.slurm.policy RUN_DIR --rc N --signal USR1|TERM|none

The exit code is an `Action`. Free of torch: it runs on a node where something has just gone wrong.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.secret import redact
from launch.slurm.exclude import exclude
from pretrain.run.job_records import Failure, JobFolder, RankFailure, this_job
from pretrain.run.lease import LOST_FOLDER
from pretrain.run.run_listing import End, recorded_end, run_state, saved_steps
from pretrain.tracking import webhook

LAUNCH_FAILED = 233
"""srun's exit code when a node did not start its tasks."""
USER_ERROR = 2
LOG_BYTES = 1 << 18
"""Of the end of the job's log, where srun's words are looked for."""
SHOWN = 300
"""Characters of an error that a reason shows."""


class Action(IntEnum):
    """What the batch script does."""

    DONE = 0
    REQUEUE = 10
    REQUEUE_AVOIDING = 11
    """… the nodes in exclude.jsonl."""
    STOP = 12
    """The job fails."""


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why."""

    action: Action
    reason: str
    nodes_to_exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a start of a job ended."""

    rc: int
    """What srun returned."""
    signal: str = "none"
    """The last signal that the batch script got: USR1, TERM or none."""
    wants_requeue: bool = False
    """The ranks saved because of the planned signal."""
    trained: bool = True
    """… and had taken a step before."""
    kill_switch: bool = False
    end: End | None = None
    """What this start has recorded, all being saved; whatever befell its processes later."""
    failure: Failure | None = None
    """What is known of it, when `rc` is not 0 or nothing was trained."""
    dead_nodes: tuple[str, ...] = ()
    """Nodes that did not start their tasks."""
    newly_excluded: tuple[str, ...] = ()
    """Nodes that the preflight of this start has excluded."""


def decide(outcome: Outcome, earlier: Sequence[Failure], max_crashes: int) -> Decision:
    """Pure. `earlier` are the failures of the same job's earlier starts.

    A job is requeued without bound only while its checkpoints advance. Its failures at the same newest checkpoint are
    counted, whatever they were, so that at most `max_crashes` requeues follow each other without progress.
    """
    rc, signal, failure, end = outcome.rc, outcome.signal, outcome.failure, outcome.end
    if end and end.finished:
        return Decision(Action.DONE, _over(end, rc))
    if signal == "TERM":  # to requeue now would revive a job that its user has cancelled
        why = (
            "Slurm ended the job (cancelled, preempted, out of time, a node lost); whether it runs again is up to Slurm"
        )
        return Decision(Action.STOP if rc else Action.DONE, why)
    if outcome.kill_switch:
        well = rc == 0 or (end and end.code == 0)
        return Decision(Action.DONE if well else Action.STOP, "the kill switch slurm/stop is there; remove it to go on")
    if rc == 0 and not outcome.wants_requeue:
        return Decision(Action.DONE, "all ranks ended well")
    if (rc == 0 or end) and outcome.wants_requeue and outcome.trained:
        return Decision(Action.REQUEUE, "saved at the planned signal, before the time limit")
    if end and not outcome.wants_requeue:
        return Decision(Action.STOP if end.code else Action.DONE, _over(end, rc))
    assert failure
    if failure.mistake or (rc == USER_ERROR and not outcome.newly_excluded):
        return Decision(Action.STOP, f"another try cannot mend it: {_told(failure)}")
    same = next((f for f in reversed(earlier) if _same(f, failure)), None)
    if same:
        return Decision(
            Action.STOP,
            f"the same failure twice at step {failure.step}, in restart {same.restart} and now: {_told(failure)}. That "
            f"is not chance: look at these samples and this code, or have the device of {failure.host} tested",
        )
    count = 1 + sum(_step(f.checkpoint) >= _step(failure.checkpoint) for f in earlier)
    since = f"the checkpoint of step {failure.checkpoint}" if failure.checkpoint else "the beginning"
    if count > max_crashes:
        return Decision(
            Action.STOP, f"{count} failures since {since}, {max_crashes} are allowed; the last one: {_told(failure)}"
        )
    counted = f"failure {count} of at most {max_crashes} since {since}: {_told(failure)}"
    if outcome.dead_nodes:
        named = ", ".join(outcome.dead_nodes)
        return Decision(Action.REQUEUE_AVOIDING, f"{named} did not start its tasks; {counted}", outcome.dead_nodes)
    if outcome.newly_excluded:
        named = ", ".join(outcome.newly_excluded)
        return Decision(Action.REQUEUE_AVOIDING, f"the preflight excluded {named}; {counted}")
    return Decision(Action.REQUEUE, counted)


def diagnose(
    outcome: Outcome, ranks: Sequence[RankFailure], words: str, checkpoint: int | None, reached: int | None
) -> Failure:
    """What a start failed of.

    Args:
        ranks: what its ranks wrote, the earliest first.
        words: the job's log of this start, with srun's own words.
        checkpoint: step of the newest one.
        reached: the last step that its heartbeat tells of.
    """
    job, restart = this_job()
    known = Failure(job or "?", restart, outcome.rc, "", checkpoint=checkpoint)
    if outcome.dead_nodes:
        return replace(known, what="the launch failed", host=outcome.dead_nodes[0])
    if outcome.newly_excluded:
        return replace(known, what="the preflight failed", host=outcome.newly_excluded[0])
    # A rank killed from outside writes nothing, and its peers only tell of a lost connection.
    killed = _first_killed(words) if outcome.rc else None
    if killed and killed[0] not in [failure.rank for failure in ranks]:
        rank, host, what = killed
        step = ranks[0].step if ranks else None if reached is None else reached + 1
        samples = ranks[0].samples if ranks else []
        return replace(known, what=what, rank=rank, host=host, step=step, samples=samples)
    if ranks:
        first = next((failure for failure in ranks if failure.mistake), ranks[0])
        return replace(
            known,
            what=first.what,
            mistake=first.mistake,
            step=first.step,
            rank=first.rank,
            host=first.host,
            samples=first.samples,
        )
    if outcome.rc == 0 or outcome.signal == "USR1":
        return replace(known, what="the planned signal came before anything was trained")
    return replace(known, what=f"srun ended with code {outcome.rc}, and no rank said why")


def _over(end: End, rc: int) -> str:
    """A recorded end in words, and what came after it."""
    later = f"; what followed ended with code {rc}, and `duet report` makes the report" if rc != end.code else ""
    return f"the run is over and saved: {end.reason}{later}"


def dead_nodes(words: str) -> tuple[str, ...]:
    """Nodes whose tasks srun could not launch."""
    found = re.findall(r"srun: error: Task launch for \S+ failed on node ([^\s:]+)", words)
    return tuple(dict.fromkeys(found))


def _first_killed(words: str) -> tuple[int, str, str] | None:
    """Rank, host and fate of the first task that srun saw end, survivors left out, if that was by a signal."""
    for host, rank, fate in re.findall(r"srun: error: ([^\s:]+): tasks? (\d+)[\d,\-]*: (.*)", words):
        if fate.startswith(("Terminated", "Exited with exit code 143")):  # what srun does to survivors
            continue
        return None if fate.startswith("Exited") else (int(rank), host, fate.strip())
    return None


def _same(one: Failure, other: Failure) -> bool:
    """The same step and, but for numbers such as times and addresses, the same words; at a step that is known."""
    return one.step is not None and one.step == other.step and _gist(one.what) == _gist(other.what)


def _gist(what: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", what)


def _step(checkpoint: int | None) -> int:
    return checkpoint or 0


def _told(failure: Failure) -> str:
    what = failure.what.strip() if len(failure.what) <= SHOWN else f"{failure.what[:SHOWN].strip()} …"
    where = [f"rank {failure.rank} on {failure.host}"] if failure.rank is not None else []
    where += [f"step {failure.step}"] if failure.step is not None else []
    where += [f"samples {failure.samples[0]} to {failure.samples[-1]}"] if failure.samples else []
    return f"{what} ({', '.join(where)})" if where else what


def _words(log: Path | None, job: str | None, restart: int) -> str:
    """The end of the job's log, from where this start said that it began."""
    if log is None or not log.is_file():
        return ""
    before = max(0, log.stat().st_size - LOG_BYTES)
    with open(log, "rb") as file:
        file.seek(before)
        text = file.read().decode(errors="replace")
    _, start, words = text.rpartition(f"job {job} restart {restart}: start on")
    return words if start or before else ""


def main(args: list[str]) -> int:
    """Look at the run folder, decide, and record it."""
    parser = argparse.ArgumentParser(prog="launch.slurm.policy", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rc", type=int, required=True)
    parser.add_argument("--signal", choices=["USR1", "TERM", "none"], default="none")
    parser.add_argument("--max-crashes", type=int, default=3)
    parser.add_argument("--log", type=Path, help="where srun's own words went")
    given = parser.parse_args(args)
    if not given.run_dir.is_dir():  # the batch script has seen it
        print(f"policy: nothing is written, and the job is not requeued: {given.run_dir}: {LOST_FOLDER}", flush=True)
        return Action.STOP if given.rc else Action.DONE
    job, restart = this_job()
    folder = JobFolder(given.run_dir)
    words = _words(given.log, job, restart)
    wish = folder.requeue_wish()
    if wish and (wish.job, wish.restart) != (job, restart):
        wish = None
    outcome = Outcome(
        rc=given.rc,
        signal=given.signal,
        wants_requeue=wish is not None,
        trained=bool(wish and wish.trained),
        kill_switch=folder.kill_switch.exists(),
        end=recorded_end(given.run_dir, job=job, restart=restart),
        dead_nodes=dead_nodes(words) if given.rc else (),
        newly_excluded=tuple(folder.excluded_by(job, restart)),
    )
    earlier = [failure for failure in folder.failures() if failure.job == job]
    in_vain = outcome.wants_requeue and not outcome.trained
    failed = given.signal != "TERM" and (in_vain or (given.rc != 0 and outcome.end is None))
    if failed:
        beat = folder.last_heartbeat()
        reached = beat.step if beat and (beat.job, beat.restart) == (job, restart) else None
        newest = None
        with suppress(CheckpointError):  # cannot be listed: not known
            newest = max(saved_steps(given.run_dir), default=None)
        failure = diagnose(outcome, folder.rank_failures(job or "?", restart), words, newest, reached)
        outcome = replace(outcome, failure=failure)
    decision = decide(outcome, earlier, given.max_crashes)
    decision = _kept(folder, decision, outcome)
    print(f"policy: {decision.action.name.lower().replace('_', ' ')}: {decision.reason}", flush=True)
    _tell(given.run_dir, decision)
    return decision.action


def _kept(folder: JobFolder, decision: Decision, outcome: Outcome) -> Decision:
    """Write down what happened and what was decided. On a disk that refuses, a decision that needs no counting stands;
    a failure that nobody would know of is not tried again."""
    try:
        if outcome.failure:
            folder.failed(outcome.failure)
        bad = dict.fromkeys(decision.nodes_to_exclude, "did not start its tasks")
        if bad and (refusal := exclude(folder, bad, int(os.environ.get("SLURM_JOB_NUM_NODES", 1)))):
            print(f"policy: no node is excluded: {refusal}", flush=True)
        folder.decided(decision.action.name, decision.reason, outcome.rc, outcome.signal)
    except OSError as error:
        print(f"policy: this is not written down: {error.filename or folder.path}: {error.strerror}", flush=True)
        if outcome.failure and decision.action in (Action.REQUEUE, Action.REQUEUE_AVOIDING):
            return replace(decision, action=Action.STOP, reason=f"{_told(outcome.failure)}; and it cannot be counted")
    return decision


def _tell(run_dir: Path, decision: Decision) -> None:
    """The webhook of the run, if it has one, what the ranks could not tell it."""
    again = decision.action in (Action.REQUEUE, Action.REQUEUE_AVOIDING)
    failed = decision.action == Action.STOP and run_state(run_dir).state not in ("failed", "killed", "finished")
    found = webhook.of_run(run_dir) if again or failed else None
    if not found:
        return
    beat = JobFolder(run_dir).last_heartbeat()
    step, attempt = (beat.step, beat.attempt) if beat else (0, 0)
    facts = webhook.about(run_dir.resolve(), found[0], step, attempt, time.time_ns() // 1_000_000)
    job, restart = this_job()
    event = {"event": "requeued" if again else "failed", "text": decision.reason, "job": job, "restart": restart}
    try:
        webhook.post(webhook.address(found[1]), event | facts)
    except (OSError, RunError) as error:  # whoever hears of it: what was decided is done
        print(f"policy: the webhook did not hear of it: {type(error).__name__}: {redact(str(error))}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
