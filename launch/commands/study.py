"""`duet study`: many runs that are compared, trained by one command and compared by another."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ConfigError
from launch.commands.runs import run_argument

if TYPE_CHECKING:
    from pretrain.study.spec import StudyRun

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

    A run whose folder is gone is done where `duet study report` has kept its journal.

    Example: `duet study run docs/experiments/learned-dropout.yaml --jobs 2`
    """
    from launch.local.study_runs import check_data, check_equal
    from pretrain.study.spec import load_study

    loaded = load_study(study)
    runs = loaded.runs(only)
    check_data(runs)
    for section in dict.fromkeys(run.section for run in runs):
        for line in check_equal(loaded, section):
            typer.echo(line)
    left, said = _left(runs, _journals(study))
    typer.echo(f"{said}; {loaded.folder}")
    if dry_run:
        for run in left:
            typer.echo(f"left: {run.place}")
        return
    _train(left, jobs, ranks)
    typer.echo(f"all done; next: {shlex.join(['duet', 'study', 'report', str(study)])}")


@app.command()
def ladder(
    study: Annotated[Path, typer.Argument(metavar="LADDER", help="The ladder's YAML file.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each run: one for each GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what is left to do.")] = False,
) -> None:
    """Train arms at several sizes with equal training FLOPs, learning rates first, and fit losses to compute.

    Given again after a stop, it goes on where it was. `duet study report LADDER` writes the page.

    Example: `duet study ladder ladder.yaml --jobs 2`
    """
    from pretrain.study.ladder import load_ladder
    from pretrain.study.results import Results, keep

    loaded = load_ladder(study)
    if loaded is None:
        raise ConfigError(f"{study}: a ladder has sizes; this is a study: duet study run {shlex.quote(str(study))}")
    kept = _journals(study)
    search = loaded.search()
    for stage in ("rates", "sizes"):
        runs = search.runs()
        if stage == "sizes":
            rates = loaded.rates_of(Results(search, kept))
            for size, of_arms in rates.items():
                typer.echo(f"{size}: " + ", ".join(f"{arm} {rate:g}" for arm, rate in of_arms.items()))
            runs = [run for run in loaded.climb(rates).runs() if run.section in loaded.sizes]
        left, said = _left(runs, kept, diverged=stage == "rates")
        typer.echo(f"{stage}: {said}; {search.folder}")
        if dry_run:
            for run in left:
                typer.echo(f"left: {run.place}, {run.config().train.steps} steps")
            if left:
                return
        _train(left, jobs, ranks, diverged=stage == "rates")
        for run in runs:
            keep(run, kept, diverged=stage == "rates")
    typer.echo(f"all done; next: {shlex.join(['duet', 'study', 'report', str(study)])}")


@app.command()
def probe(
    runs: Annotated[list[Path], run_argument(metavar="RUN…", help="Run folders or checkpoints.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where findings and pictures go.")] = Path("probes"),
    tokens: Annotated[int, typer.Option(min=1, help="Of held-out text; probes are trained on two thirds.")] = 24576,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the models that were not trained.")] = 0,
) -> None:
    """Say what the streams of trained models know, layer by layer: linear probes, and how alike states are (CKA).

    Each is held beside a model of the same shape that was not trained. A table is printed; findings and pictures are
    written into FOLDER. Where that is the folder of a study, `duet study report` puts them into its page.

    Examples: `duet study probe runs/first`,
    `duet study probe runs/parallel runs/decoder --to what-they-know --tokens 100000`
    """
    from data_pipeline.files.atomic import check_writable, write_atomic
    from pretrain.probing.findings import FILE

    check_writable(to / FILE)  # before minutes are spent
    from pretrain.probing.examine import examine
    from pretrain.probing.page import pictures, table

    found = examine(runs, tokens, seed, lambda text: typer.echo(text, err=True))
    found.write(to)
    for name, content in pictures(found).items():
        write_atomic(to / f"{name}.png", content)
    typer.echo("\n".join(table(found)))


@app.command()
def report(study: StudyArg) -> None:
    """Keep the finished runs' journals beside the study, and write tables and pictures from them into its page.

    The page is STUDY.md, where STUDY.yaml is the study; what is kept goes into the folder STUDY. In a page that is
    there only what stands between marks is written anew.

    Example: `duet study report docs/experiments/learned-dropout.yaml`
    """
    from pretrain.probing.findings import FILE, Findings
    from pretrain.probing.page import NAME, table
    from pretrain.study.ladder import FIT, load_ladder
    from pretrain.study.ladder_page import fit_of, points_of
    from pretrain.study.page import NOT_RUN, Page
    from pretrain.study.plots import pictures
    from pretrain.study.results import Results, keep
    from pretrain.study.spec import load_study

    kept = _journals(study)
    rungs, more, curves = load_ladder(study), dict[str, list[str]](), dict[str, bytes]()
    loaded = rungs.search() if rungs else load_study(study)
    new = sum(keep(run, kept, diverged=rungs is not None) for run in loaded.runs(list(loaded.sections)))
    later = [f"{name}-validation" for name, section in loaded.sections.items() if not section.settings]
    if rungs:  # the page is begun whole, whenever that is
        more = {name: [f"*{NOT_RUN}*"] for name in (*rungs.sizes, FIT)}
        later += [*(f"{name}-validation" for name in rungs.sizes), f"{FIT}-curves"]
    results = Results(loaded, kept)
    if rungs and all(results.of(run.section, run.arm) for run in loaded.runs()):
        loaded = rungs.climb(rungs.rates_of(results))
        new += sum(keep(run, kept) for run in loaded.runs(list(rungs.sizes)))
        results = Results(loaded, kept)
        more[FIT], curves = fit_of(rungs, points_of(rungs, results))
    if (kept.parent / FILE).is_file():
        more[NAME] = [*table(Findings.read(kept.parent))]
        later += [f"{NAME}-answers", f"{NAME}-likeness"]
    page = study.with_suffix(".md")
    Page(loaded, results, page, more, later, computed=rungs is not None).write(pictures(loaded, results) | curves)
    typer.echo(f"{page}: {new} runs read from {loaded.folder}")


def _journals(study: Path) -> Path:
    """Where the journals of its finished runs are kept."""
    return study.with_suffix("") / "journals"


def _left(runs: "list[StudyRun]", kept: Path, *, diverged: bool = False) -> "tuple[list[StudyRun], str]":
    """Those that are still to be trained, and words on how many are not; `diverged`: one that has is done."""
    from launch.local.study_runs import is_done
    from pretrain.study.results import is_kept

    missing = [run for run in runs if not is_done(run, diverged=diverged)]
    left = [run for run in missing if run.path.exists() or not is_kept(run, kept)]
    said = f"{len(runs)} runs, of which {len(runs) - len(left)} are done"
    if alone := len(missing) - len(left):
        said += f", {alone} of them without a run folder, by what is kept in {kept}"
    return left, said


def _train(left: "list[StudyRun]", jobs: int, ranks: int, *, diverged: bool = False) -> None:
    """To the end of all of them, or of the command; `diverged`: one that diverges has not failed."""
    from launch.local.study_runs import Running

    os.environ.pop("RANK", None)
    running = Running(left, jobs, ranks, typer.echo, diverged)
    running.work()
    if running.failed:
        typer.echo(f"error: {len(running.failed)} runs failed: {', '.join(r.place for r in running.failed)}", err=True)
        raise typer.Exit(1)
    if running.runs:
        raise typer.Exit(130)
