"""`duet cancel`, `duet requeue`, `duet resume`: what a user does with a run's jobs. Unless told, nothing is lost."""

import os
import pwd
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import RunError
from launch.commands.runs import RunArg

if TYPE_CHECKING:
    from launch.slurm.client import Job
    from launch.slurm.run_status import Status


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
    elif status.state in ("running", "validating"):
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


POLL_SECONDS = 0.2
STATUS_SECONDS = 5.0
"""How often a follower asks Slurm whether the run goes on."""
BLOCK = 1 << 16


def logs(
    run: RunArg,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="The log of this rank, instead of the job's.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of the end to begin with.")] = 50,
) -> None:
    """Show the end of the job's log, or of a rank's. A run without a job has those of its ranks only.

    The job's holds what the batch script, rank 0 and srun say.
    -f waits for a log that is not there yet, and goes on through requeues and into the log of the next job.

    Examples: `duet logs runs/first -f`, `duet logs runs/first --rank 3 --lines 200`
    """
    from launch.slurm.run_status import status

    found, _ = status(run)
    log = _log(run, found, rank)
    if not follow and not log.is_file():
        raise RunError(_missing(run, found, log, rank))
    try:
        tail = _Tail(log, lines)
        tail.show()
        if follow:
            _follow(run, rank, tail)
    except KeyboardInterrupt:
        pass  # the way to end -f


class _Tail:
    """A log that is written to, from its last lines on, or whole."""

    def __init__(self, path: Path, lines: int | None) -> None:
        self.path = path
        self._position = 0 if lines is None else _start_of_last(path, lines)

    def show(self) -> bool:
        """Whether there was anything new."""
        try:
            size = self.path.stat().st_size
            if size < self._position:  # begun anew: the site truncates it at a requeue
                self._position = 0
            if size == self._position:
                return False
            with open(self.path, "rb") as file:
                file.seek(self._position)
                while block := file.read(BLOCK):
                    typer.echo(block, nl=False)
                    self._position += len(block)
        except FileNotFoundError:  # it comes with the start of the job
            return False
        sys.stdout.flush()
        return True


def _follow(run: Path, rank: int | None, tail: _Tail) -> None:
    from launch.slurm.run_status import status

    if not tail.path.is_file():
        typer.echo(f"waiting for {tail.path}", err=True)
    told, asked = "", 0.0
    while True:
        if time.monotonic() - asked > STATUS_SECONDS:
            found, problem = status(run)
            asked = time.monotonic()
            if found.state != told and not tail.path.is_file():
                typer.echo(f"{found.state}{f': {found.why}' if found.why else ''}", err=True)
                told = found.state
            over = not found.live and (not problem or found.job is None or found.state == "finished")
            if over:
                while tail.show():
                    pass
                typer.echo(f"{run}: {found.state}{f' ({found.why})' if found.why else ''}", err=True)
                return
            log = _log(run, found, rank)
            if log != tail.path:
                tail.show()
                typer.echo(f"== {log} ==", err=True)
                tail = _Tail(log, None)
        if not tail.show():
            time.sleep(POLL_SECONDS)


def _log(run: Path, found: "Status", rank: int | None) -> Path:
    from launch.slurm import client

    ranks = run / "logs"
    if rank is not None or found.job is None:
        return ranks / f"rank-{rank or 0}.log"
    if (written := _from_script(run, found.job)) and written.is_file():
        return written
    if client.available():
        try:
            return client.output(found.job) or written or ranks / "rank-0.log"
        except client.SlurmError as error:
            if written is None:
                typer.echo(str(error), err=True)
    return written or ranks / "rank-0.log"


def _from_script(run: Path, job: str) -> Path | None:
    """As the submitted script names it."""
    from pretrain.run.job_records import JobFolder

    try:
        script = JobFolder(run).script.read_text(errors="replace")
    except OSError:
        return None
    options = dict(re.findall(r'^#SBATCH\s+--(output|job-name)=("(?:\\.|[^"\\])*"|\S+)', script, re.MULTILINE))
    if "output" not in options:
        return None
    array, _, element = job.partition("_")
    plain = {
        name: re.sub(r"\\(.)", r"\1", value[1:-1] if value[0] == '"' else value) for name, value in options.items()
    }
    values = {"%": "%", "j": job, "A": array, "a": element, "x": plain.get("job-name", "")}
    path = re.sub(r"%([%jAax])", lambda match: values[match[1]], plain["output"])
    return run / path


def _missing(run: Path, found: "Status", log: Path, rank: int | None) -> str:
    there = sorted(int(file.stem.removeprefix("rank-")) for file in (run / "logs").glob("rank-*.log"))
    if rank is not None and there:
        return f"{log}: no such log; there are those of ranks {there[0]} to {there[-1]}"
    why = f"{found.state}{f': {found.why}' if found.why else ''}"
    return f"{log}: no log yet ({why}); `duet logs {shown(run)} -f` waits for it"


def _start_of_last(path: Path, lines: int) -> int:
    """Where the last lines begin."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        position = end = file.seek(0, 2)
        tail, newlines = b"", 0
        while position and newlines <= lines:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            block = file.read(size)
            newlines += block.count(b"\n")
            tail = block + tail
    kept = tail.splitlines(keepends=True)[-lines:] if lines else []
    return end - sum(map(len, kept))
