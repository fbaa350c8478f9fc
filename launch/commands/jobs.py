"""`duet cancel`, `duet requeue`, `duet resume`: what a user does with a run's jobs. Unless told, nothing is lost."""

import os
import pwd
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import RunError
from launch.completion import complete_runs

if TYPE_CHECKING:
    from launch.slurm.client import Job
    from launch.slurm.run_status import Status

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_runs)]


def cancel(
    run: RunArg,
    now: Annotated[bool, typer.Option("--now", help="Let Slurm end it, without waiting for the step's end.")] = False,
) -> None:
    """End the jobs of a run for good. One that trains saves at the end of its step; others have nothing to save.

    With --now a job has what the site gives it to save (30 s, most likely); what is lost goes back to the last
    checkpoint. `duet resume` goes on after either.

    Examples: `duet cancel runs/first`, `duet cancel runs/first --now`
    """
    from launch.slurm import client
    from pretrain.run.job_records import JobFolder

    status, jobs = _live_jobs(run)
    now = now or status.state == "starting"  # there is nothing to save
    for job in sorted(jobs, key=lambda job: not job.waiting):  # first those that would follow the one that runs
        if job.waiting or now:
            client.cancel(job.id)
            done = "is removed from the queue" if job.waiting else "is told to end at once"
            typer.echo(f"job {job.id} {done}")
            continue
        if job.state == "COMPLETING":
            typer.echo(f"job {job.id} is ending already")
            continue
        kill_switch = JobFolder(run).kill_switch
        kill_switch.parent.mkdir(exist_ok=True)
        kill_switch.touch()  # no signal beside it: one that comes while a rank ends would make it a failure
        typer.echo(
            f"job {job.id} saves at the end of its step and ends, for good ({kill_switch}); "
            f"`duet status {shown(run)}` tells when it has, `duet cancel {shown(run)} --now` does not wait for it"
        )
    if status.state == "stalled" and not now:
        typer.echo(f"{status.why}: if it hangs, it will not save; then `duet cancel {shown(run)} --now`")


def requeue(
    run: RunArg,
    now: Annotated[
        bool, typer.Option("--now", help="End it at once; the steps since the last checkpoint are done again.")
    ] = False,
) -> None:
    """Give the nodes back and queue the job again, for instance to get away from a slow node. It saves before.

    Examples: `duet requeue runs/first`, `duet requeue runs/first --now`
    """
    from launch.slurm import client
    from pretrain.run.job_records import JobFolder

    status, jobs = _live_jobs(run)
    job = next((job for job in jobs if not job.waiting), None)
    if job is None:
        raise RunError(f"{run}: job {status.job} waits in the queue already ({status.why or status.job_state})")
    kill_switch = JobFolder(run).kill_switch
    if job.state == "COMPLETING" or kill_switch.exists():
        why = "is ending" if job.state == "COMPLETING" else f"was asked to end for good ({kill_switch})"
        raise RunError(f"{run}: job {job.id} {why}; wait until it has, then `duet resume {shown(run)}`")
    if now or status.state == "starting":
        client.requeue(job.id)
        since = "the beginning" if status.checkpoint is None else f"step {status.checkpoint}"
        typer.echo(f"job {job.id} goes back into the queue at once; it will go on from {since}")
    elif status.state == "running":
        client.signal(job.id, "USR1")
        typer.echo(f"job {job.id} saves at the end of its step and goes back into the queue")
    else:
        raise RunError(
            f"{run}: {status.state} ({status.why}), so it would not save now; "
            f"`duet requeue {shown(run)} --now` does without"
        )


def resume(
    run: RunArg,
    nodes: Annotated[
        str | None, typer.Option(metavar="N|N-M", help="Nodes, or a range; those of the last submission unless given.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another site than that of the last submission.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit of the job; that of the last submission unless given.")
    ] = None,
) -> None:
    """Submit a run again that has stopped: it goes on from its newest checkpoint, also on another number of nodes.

    It is the code and the configuration of the last submission that run.

    Examples: `duet resume runs/first`, `duet resume runs/first --nodes 2-8`
    """
    from launch.slurm.run_status import status_and_jobs
    from pretrain.run.job_records import JobFolder

    status, jobs = status_and_jobs(run)
    if live := [job for job in jobs if not job.ended]:
        raise RunError(
            f"{run}: job {live[0].id} is still there ({live[0].state}); `duet cancel {shown(run)}` ends it, "
            f"`duet requeue {shown(run)}` gives it other nodes"
        )
    if status.live:
        raise RunError(f"{run}: it trains outside of Slurm; end it with Ctrl-C first")
    if status.state == "finished":
        raise RunError(
            f"{run}: all {status.total} steps are done; to train on, "
            f"`duet submit {shown(run / 'config.yaml')} train.steps=MORE`"
        )
    from launch.slurm.submit import resubmit

    JobFolder(run).kill_switch.unlink(missing_ok=True)
    resubmit(run, nodes, cluster, time)


def _live_jobs(run: Path) -> "tuple[Status, list[Job]]":
    """Those that run or wait, all of this user."""
    from launch.slurm.run_status import status_and_jobs

    status, jobs = status_and_jobs(run)
    live = [job for job in jobs if not job.ended]
    if not live and status.job is None:
        here = "; it trains outside of Slurm: end it with Ctrl-C" if status.live else "; `duet submit` makes one"
        raise RunError(f"{run}: no job is known of this run{here}")
    if not live:
        ended = status.job_state or "Slurm does not know it any more"
        raise RunError(
            f"{run}: job {status.job} has ended already ({ended}); `duet resume {shown(run)}` submits the run again"
        )
    me = pwd.getpwuid(os.getuid()).pw_name
    others = [job for job in live if job.user != me]
    if others and os.getuid() != 0:
        raise RunError(f"{run}: job {others[0].id} is {others[0].user}'s, and you are {me}: ask them to do it")
    return status, live


def shown(path: Path) -> str:
    """As a shell reads it, in a command that is printed."""
    return shlex.quote(str(path))
