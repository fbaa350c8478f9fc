"""`duet study`: many runs that are compared, trained by one command and compared by another."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare many runs: a study, as one YAML file tells it.")
StudyArg = Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML file.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="SECTION[/ARM]", help="Only these; may be given several times."),
]


@app.command()
def run(
    study: StudyArg,
    only: OnlyOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each run: one for each GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what is left to do.")] = False,
) -> None:
    """Train what is not trained yet; given again after a stop, it goes on where it was.

    Example: `duet study run docs/experiments/learned-dropout.yaml --jobs 2`
    """
    from launch.local.study_runs import Running, check_equal, is_done
    from pretrain.study.spec import load_study

    loaded = load_study(study)
    runs = loaded.runs(only)
    for section in dict.fromkeys(run.section for run in runs):
        for line in check_equal(loaded, section):
            typer.echo(line)
    left = [run for run in runs if not is_done(run)]
    typer.echo(f"{len(runs)} runs, of which {len(runs) - len(left)} are done; {loaded.folder}")
    if dry_run:
        for run in left:
            typer.echo(f"left: {run.place}")
        return
    os.environ.pop("RANK", None)
    running = Running(left, jobs, ranks, typer.echo)
    running.work()
    if running.failed:
        typer.echo(f"error: {len(running.failed)} runs failed: {', '.join(r.place for r in running.failed)}", err=True)
        raise typer.Exit(1)
    if running.runs:
        raise typer.Exit(130)
    typer.echo(f"all done; next: {shlex.join(['duet', 'study', 'report', str(study)])}")


@app.command()
def report(study: StudyArg) -> None:
    """Keep the finished runs' journals beside the study, and write tables and pictures from them into its page.

    The page is STUDY.md, where STUDY.yaml is the study; what is kept goes into the folder STUDY. In a page that is
    there only what stands between marks is written anew.

    Example: `duet study report docs/experiments/learned-dropout.yaml`
    """
    from pretrain.study.page import Page
    from pretrain.study.plots import pictures
    from pretrain.study.results import Results, keep
    from pretrain.study.spec import load_study

    loaded = load_study(study)
    kept = study.with_suffix("") / "journals"
    new = sum(keep(run, kept) for run in loaded.runs(list(loaded.sections)))
    results = Results(loaded, kept)
    page = study.with_suffix(".md")
    Page(loaded, results, page).write(pictures(loaded, results))
    typer.echo(f"{page}: {new} runs read from {loaded.folder}")
