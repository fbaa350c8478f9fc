"""`duet logs`: what the job of a run, or one of its ranks, has written; followed across requeues."""

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import RunError
from launch.commands.jobs import RunArg, shown

if TYPE_CHECKING:
    from launch.slurm.run_status import Status

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
