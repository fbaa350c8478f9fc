"""`duet runs`: what runs there are."""

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.completion import complete_runs

if TYPE_CHECKING:
    from pretrain.run.run_listing import RunState

app = typer.Typer(no_args_is_help=True, help="Look at runs.")
run_argument = partial(typer.Argument, autocompletion=complete_runs)
"""An argument that names a run, or several."""
RunArg = Annotated[Path, run_argument(metavar="RUN", help="A run folder.")]
COLUMNS = ("RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "JOB", "AGE")


@app.callback()
def _group() -> None:
    """Keeps `ls` a word of its own."""


@app.command("ls")
def ls(
    folder: Annotated[Path, run_argument(metavar="FOLDER", help="Where the run folders are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """List the runs in a folder, the newest first.

    Example: `duet runs ls runs`
    """
    from data_pipeline.errors import RunError
    from data_pipeline.places import RUN, mistaken
    from pretrain.run.run_listing import list_runs

    runs = list_runs(folder)
    if not runs and (told := mistaken(folder, RUN)):
        raise RunError(f"{folder}: {told}")
    if as_json:
        typer.echo(json.dumps([_strict(asdict(run)) for run in runs], indent=1))
        return
    for line in aligned([COLUMNS, *(_row(run) for run in runs)]):
        typer.echo(line)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows of a table as lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(run: "RunState") -> tuple[str, ...]:
    from pretrain.tracking.durations import duration

    return (
        run.path,
        run.state,
        "-" if run.step is None else str(run.step),
        "-" if run.loss is None else f"{run.loss:.4f}",
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:.0f}",
        run.job or "-",
        duration(max(0.0, time.time() - run.started)),
    )


def _strict(fields: dict[str, object]) -> dict[str, object]:
    """JSON knows no nan."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


track_app = typer.Typer(no_args_is_help=True, help="Bring MLflow up to date with a run's journal, or export it.")


@track_app.command("sync")
def sync(
    run: RunArg,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Make it a run of its own there: of a copy, or when its run was deleted.")
    ] = False,
    all_masks: Annotated[
        bool, typer.Option("--all-masks", help="From now on send everything about masks, not a few summaries.")
    ] = False,
) -> None:
    """Send what MLflow does not have, from wherever it is reachable; a run that died is KILLED there.

    Example: `duet track sync runs/quickstart`
    """
    from pretrain.tracking.follower import sync as sync_run

    done = sync_run(run, lambda warning: typer.echo(f"warning: {warning}", err=True), new_run, all_masks)
    typer.echo(
        f"{done.uri} has all of {run} as run {done.run_id}, {done.status}; {done.num_metrics:,} values were sent now; "
        f"its page: {done.page}"
    )


@track_app.command("export")
def export(
    runs: Annotated[list[Path], run_argument(metavar="RUN…", help="Run folders.")],
    to: Annotated[str, typer.Option("--to", metavar="tensorboard", help="What is to read it.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A folder that gets one for each run; unless given, `tensorboard` in each run folder."),
    ] = None,
) -> None:
    """Write the journals of runs as files that another tool reads: every metric, without what was superseded.

    Example: `duet track export runs/a runs/b --to tensorboard --out boards`
    """
    from data_pipeline.errors import ConfigError
    from pretrain.tracking.tensorboard import FOLDER, export

    if to != "tensorboard":
        raise ConfigError(f"--to {to}: the only one is tensorboard")
    names = [run.resolve().name for run in runs]
    if out and (twice := {name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--out {out}: several runs are called {', '.join(sorted(twice))}; leave --out out")
    for run, name in zip(runs, names, strict=True):
        export(run, out / name if out else run / FOLDER, typer.echo)
