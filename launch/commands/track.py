"""`duet track`: the mirror of a run's journal in MLflow."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Bring MLflow up to date with a run's journal.")


@app.callback()
def _group() -> None:
    """Keeps `sync` a word of its own."""


@app.command("sync")
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Make it a run of its own there: of a copy, or when its run was deleted.")
    ] = False,
) -> None:
    """Send what MLflow does not have, from wherever it is reachable; a run that died is KILLED there.

    Example: `duet track sync runs/quickstart`
    """
    from pretrain.tracking.mlflow_follower import sync as sync_run

    done = sync_run(run, lambda warning: typer.echo(f"warning: {warning}", err=True), new_run)
    typer.echo(
        f"{done.uri} has all of {run} as run {done.run_id}, {done.status}; {done.num_metrics:,} values were sent now"
    )
