"""How runs stand: what Slurm says of their jobs, joined with what their folders say. Free of torch.

Without Slurm, or when it does not answer, the folders alone must do.
"""

import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.places import RUN, mistaken
from launch.slurm import client
from launch.slurm.client import Job, SlurmError
from launch.slurm.run_files import RunFiles, find_runs, read_files
from pretrain.run.job_records import Failure
from pretrain.run.run_listing import is_run

MOST_TEXT = 300
ENDS = ("finished", "stopped", "cancelled", "failed", "dead", "timed out", "preempted", "unreadable")
"""States that nothing changes but a new start."""
REASONS = {
    "AssocGrpCpuLimit": "a limit of your account",
    "BeginTime": "its begin time is still to come",
    "Dependency": "it waits for another job's end",
    "DependencyNeverSatisfied": "the job it waits for failed, so that it never starts: `duet cancel` removes it",
    "JobArrayTaskLimit": "so many elements of its array may run at a time",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held: `scontrol release` lets it go",
    "JobHoldMaxRequeue": "it was requeued too often and is held",
    "Licenses": "it waits for a licence",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "it asks for more nodes than the partition has in service",
    "PartitionTimeLimit": "it asks for more time than the partition allows",
    "Priority": "others are before it",
    "ReqNodeNotAvail": "nodes that it needs are reserved or down",
    "Reservation": "it waits for its reservation",
    "Resources": "it waits for free nodes",
}


@dataclass(frozen=True)
class Status:
    """How a run stands. Times in seconds since the epoch; None is what is not known."""

    run: str
    state: str
    """queued, starting, running, validating, stalled, stopping, requeued, suspended; or one of `ENDS`; submitted: Slurm
    alone would know."""
    why: str
    """Of the state, where there is something to say."""
    job: str | None
    job_state: str | None
    """Slurm's word."""
    node_count: int | None
    nodes: str
    step: int | None
    total: int | None
    loss: float | None
    """Last one logged, in nats per token."""
    tokens_per_second: float | None
    last_step: float | None
    """When it was taken."""
    checkpoint: int | None
    """Step of the newest complete one."""
    checkpoint_time: float | None
    attempts: int
    restarts: int
    """Of this job, by Slurm."""
    submitted: float | None
    starts: float | None
    """Estimated, of a job that waits."""
    job_ends: float | None
    """When its time is over."""
    time_left: float | None
    """Of the job, in seconds."""
    run_ends: float | None
    """Estimated from the speed."""
    more_jobs: list[str]
    """Further ones of this run in the queue."""
    excluded: list[dict[str, Any]]
    failures: list[Failure]
    decision: dict[str, Any]
    """What the batch script decided last (`launch.slurm.policy`), and why; empty when there is none."""
    owner: str | None
    """User whose job it is."""

    @property
    def live(self) -> bool:
        """Whether something runs or waits."""
        return self.state not in (*ENDS, "submitted")


def statuses(paths: Iterable[Path]) -> tuple[list[Status], str]:
    """Of runs and of the runs in folders, each once, the newest first; and why Slurm was not asked, or nothing.

    Raises:
        RunError: a folder that is not there.
    """
    files = [read_files(path) for path in find_runs(paths)]
    jobs, problem = _ask(files)
    found = [join(one, _of_run(one.jobs, jobs), asked=not problem) for one in files]
    order = {str(one.path): one.run.started for one in files}
    return sorted(found, key=lambda s: order[s.run], reverse=True), problem


def status(run_dir: Path) -> tuple[Status, str]:
    """Of one run; and why Slurm was not asked, or nothing.

    Raises:
        RunError: it is not a run folder.
    """
    files = _files(run_dir)
    jobs, problem = _ask([files])
    return join(files, _of_run(files.jobs, jobs), asked=not problem), problem


def status_and_jobs(run_dir: Path) -> tuple[Status, list[Job]]:
    """Of one run, with all of its jobs that Slurm knows.

    Raises:
        RunError: it is not a run folder.
        SlurmError: Slurm cannot be asked.
    """
    files = _files(run_dir)
    jobs = _of_run(files.jobs, client.jobs(files.jobs)) if files.jobs else []
    return join(files, jobs, asked=True), jobs


def join(files: RunFiles, jobs: list[Job], *, asked: bool, now: float | None = None) -> Status:
    """The status of a run whose jobs Slurm knows as `jobs`; `asked`: it has answered."""
    now = time.time() if now is None else now
    run, beat = files.run, files.heartbeat
    job = _current(jobs)
    state, why = _state(files, job, asked, now)
    ours = beat if beat and beat.attempt == run.attempts else None
    step = ours.step if ours else run.step
    speed = run.tokens_per_second or (ours.tokens_per_second if ours else None)
    seconds_a_step = files.batch_tokens / speed if files.batch_tokens and speed else None
    going = state in ("running", "validating", "stopping") and ours and files.total and seconds_a_step
    return Status(
        run=str(files.path),
        state=state,
        why=" ".join(why.split())[:MOST_TEXT],
        job=job.id if job else (files.jobs[-1] if files.jobs else None),
        job_state=job.state if job else None,
        node_count=job.node_count if job else None,
        nodes=job.nodes if job else "",
        step=step,
        total=files.total,
        loss=ours.loss if run.loss is None and ours else run.loss,
        tokens_per_second=speed,
        last_step=ours.time if ours else None,
        checkpoint=files.checkpoint,
        checkpoint_time=files.checkpoint_time,
        attempts=run.attempts,
        restarts=(job.restarts if job else None) or (ours.restart if ours else 0),
        submitted=job.submitted if job else None,
        starts=job.start if job and job.waiting else None,
        job_ends=job.end if job and not job.waiting else None,
        time_left=job.time_left if job and not job.ended else None,
        run_ends=ours.time + (files.total - ours.step) * seconds_a_step
        if going and ours and files.total and seconds_a_step
        else None,
        more_jobs=[one.id for one in jobs if one.waiting and one is not job],
        excluded=files.excluded,
        failures=files.failures,
        decision=files.decision,
        owner=job.user if job else None,
    )


def _files(run_dir: Path) -> RunFiles:
    if not is_run(run_dir):
        told = mistaken(run_dir, RUN) or "not a run folder; `duet status FOLDER` lists those in a folder"
        raise RunError(f"{run_dir}: {told}")
    return read_files(run_dir)


def _state(files: RunFiles, job: Job | None, asked: bool, now: float) -> tuple[str, str]:
    run = files.run
    if run.state == "unreadable":
        return run.state, run.problem
    in_this_job = job is not None and run.job == job.number
    if run.state == "running" and not in_this_job and (job is None or job.ended or job.waiting):
        return _training(files, now)  # started by hand, or in a job that Slurm cannot be asked about
    if job and not job.ended:
        return _queued(job) if job.waiting else _in_job(files, job, now)
    if job and not in_this_job and run.attempts and job.end and run.started > job.end:
        job = None  # started by hand since
    if run.state == "finished" and (in_this_job or not job or not job.submitted or run.started > job.submitted):
        return run.state, ""
    if job and job.ended:
        return _ended(files, job)
    if not run.attempts:
        return (
            ("submitted", "Slurm alone knows more") if not asked else ("dead", "Slurm does not know its job any more")
        )
    failure = files.failures[-1:] if run.state in ("failed", "dead") else []
    if run.state == "killed":
        return "stopped", f"saved at a signal; {_again(files)} goes on"
    if run.state == "dead":
        return "dead", told(failure[0]) if failure else f"its process is gone and said nothing; {_again(files)} goes on"
    return run.state, told(failure[0]) if failure else run.problem


def _again(files: RunFiles) -> str:
    """The command with which a run goes on: where it has trained so far."""
    return "`duet resume`" if files.jobs else f"`duet train {shlex.quote(str(files.path / 'config.yaml'))}`"


def _queued(job: Job) -> tuple[str, str]:
    code = job.reason.split(",")[0].strip("()")
    words = REASONS.get(code)
    why = f"{job.reason}: {words}" if words else job.reason
    again = bool(job.restarts) or job.state.startswith("REQUEUE") or job.state == "SPECIAL_EXIT"
    if job.state == "CONFIGURING":
        return "starting", "Slurm prepares the nodes"
    return ("requeued" if again else "queued"), why


def _in_job(files: RunFiles, job: Job, now: float) -> tuple[str, str]:
    """Slurm says that the job is there."""
    run, beat = files.run, files.heartbeat
    if job.state == "SUSPENDED":
        return "suspended", "an administrator has suspended the job, or a job of higher priority has its nodes"
    ours = run.job == job.number and (
        job.start is None
        or run.started >= job.start - 1
        or (beat is not None and beat.attempt == run.attempts and beat.restart == job.restarts)  # clocks differ
    )
    if job.state == "COMPLETING":
        return "stopping", "Slurm waits for the end of its processes"
    if ours and run.state == "finished":
        return "finished", "the job is about to end"
    if ours and run.state != "running":
        return "stopping", "the ranks have ended; the batch script decides what follows"
    if ours and beat and beat.attempt == run.attempts:
        return _training(files, now)
    if files.asked_to_stop:
        return "stopping", "asked to, before its first step"
    return "starting", "no step yet" + ("" if job.start is None else f" in {_clock(now - job.start)}")


def _training(files: RunFiles, now: float) -> tuple[str, str]:
    run, beat = files.run, files.heartbeat
    if not (beat and beat.attempt == run.attempts):
        return "starting", "no step yet"
    since = now - max(beat.time, beat.validating or 0.0)
    if since > files.hang_seconds:
        what = "batch of a validation" if beat.validating else "step"
        return "stalled", f"no {what} since {_clock(since)}: it hangs, or saves for very long"
    if files.asked_to_stop:
        return "stopping", "asked to, at the end of its step"
    return ("running", "") if beat.validating is None else ("validating", f"{beat.validated or 0.0:.0%} done")


def _ended(files: RunFiles, job: Job) -> tuple[str, str]:
    if job.state == "COMPLETED":
        if files.run.state == "killed":
            return "stopped", "saved and ended; `duet resume` goes on"
        return files.run.state if files.run.state in ENDS else "dead", "its job ended as if all were well"
    words = {"CANCELLED": "cancelled", "TIMEOUT": "timed out", "DEADLINE": "timed out", "PREEMPTED": "preempted"}
    state = words.get(job.state, "failed")
    if state == "failed" and files.decision.get("job") in (job.id, job.number):
        return state, str(files.decision.get("reason"))
    code = f", exit code {job.exit_code}" if job.exit_code else ""
    return state, f"{job.reason or job.state}{code}" if state == "failed" else ""


def told(failure: Failure) -> str:
    """Where and why."""
    step = "" if failure.step is None else f"step {failure.step}, "
    where = "" if failure.rank is None else f"rank {failure.rank} on {failure.host}: "
    return f"{step}{where}{failure.what}"


def _ask(files: list[RunFiles]) -> tuple[dict[str, Job], str]:
    if not client.available():
        return {}, "no Slurm here: from the run folders alone"
    try:
        jobs = client.jobs(job for one in files for job in one.jobs)
        forgotten = [
            one.jobs[-1] for one in files if one.jobs and one.run.state != "finished" and not _of_run(one.jobs, jobs)
        ]
        return jobs | client.remembered(forgotten), ""
    except SlurmError as error:
        return {}, f"Slurm was not asked, so from the run folders alone: {error}"


def _of_run(job_ids: list[str], jobs: dict[str, Job]) -> list[Job]:
    """In the order of submission; of an array, its elements."""
    found: dict[str, Job] = {}
    for job_id in job_ids:
        mine = [jobs[job_id]] if job_id in jobs else [j for name, j in jobs.items() if name.startswith(f"{job_id}_")]
        found |= {job.id: job for job in mine}
    return list(found.values())


def _current(jobs: list[Job]) -> Job | None:
    """The one that runs; else the first that waits; else the last that ended."""
    running = [job for job in jobs if not job.ended and not job.waiting]
    waiting = [job for job in jobs if job.waiting]
    ended = sorted((job for job in jobs if job.ended), key=lambda job: job.end or 0.0)
    return next(iter([*running, *waiting, *reversed(ended)]), None)


def _clock(seconds: float) -> str:
    from pretrain.tracking.durations import duration

    return duration(max(0.0, seconds))
