"""`duet`: the command line. Each command imports what it runs inside its own function."""

import atexit
import gc
import io
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import ConfigError, UserError
from data_pipeline.files.atomic import DISK_ERRORS
from data_pipeline.files.mapped import told
from data_pipeline.secret import WAY_ON, argument_of_secret
from launch.commands import checkpoint, data, jobs, plan, preflight, runs, status, study, submit
from launch.commands.generate import generate
from launch.commands.runs import run_argument
from launch.completion import complete_changes, complete_configs, complete_runs, shipped
from launch.config_keys import dashed_key
from pretrain import status_line
from pretrain.run.provenance import check_code

ConfigArgs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG… KEY=VALUE…",
        help="YAML files or presets, then overrides such as optimizer.lr=3e-4.",
        autocompletion=complete_configs,
    ),
]
RunArg = Annotated[Path, run_argument(metavar="RUN", help="A run folder, a checkpoint or an export.")]
FREE_TEXT = ("--prompt", "--stop", "--chat")
"""What these options take is no place, and is written nowhere."""
StepOption = Annotated[int | None, typer.Option("--step", help="Use the checkpoint of this step, not the newest.")]
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(plan.app, name="model")
app.add_typer(runs.app, name="runs")
app.add_typer(study.app, name="study")
app.add_typer(runs.track_app, name="track")
app.command("plan")(plan.plan)
app.command("submit")(submit.submit)
app.command("preflight")(preflight.preflight)
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")


def _version(asked: bool) -> None:
    """Print it and end; from what is installed, nothing of which is imported."""
    from importlib.metadata import PackageNotFoundError, version

    if not asked:
        return
    for name in ("duet-pretrain", "torch", "deepspeed"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    typer.echo(f"python {platform.python_version()}")
    raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="The version; of torch, DeepSpeed and Python, too.", callback=_version),
    ] = False,
) -> None:
    """Duet: pretrain parallel encoder-decoders with learned dropout, and what they are compared with."""


@app.command()
def train(
    config: ConfigArgs,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine: one for each GPU.")] = 1,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@STEP]",
            help="Begin with a checkpoint of another run, or an export.",
            autocompletion=complete_runs,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what DeepSpeed and torch print, too.")] = False,
) -> None:
    """Train, or go on from the newest checkpoint of the run folder.

    Example: `duet train model/tiny run/quickstart data.path=data/python-docs --ranks 2`

    With --from it is a new run of the other's configuration, changed by what is given: for instance
    `duet train --from runs/a@9000 run.name=a-cooled schedule.kind=wsd schedule.cooldown=1000 train.steps=10000`.
    """
    from pretrain.config.schema import load

    if start_from:
        from pretrain.run.origin import first_file

        config = [str(first_file(start_from)), *config, f"run.start_from={start_from}"]
    loaded = load(config)
    loaded.micro_batches(ranks)
    if dry_run:
        from launch.local.dry_run import describe

        typer.echo(describe(loaded, ranks))
        return
    from data_pipeline.files.filesystem import is_uri
    from data_pipeline.storage.manifest import Manifest
    from launch.local.local_ranks import run_ranks

    if not is_uri(loaded.data.path):
        Manifest.load(loaded.data.path)  # before torch is imported, and a folder is made
    raise typer.Exit(run_ranks(config, ranks, loaded.run_dir / "logs", verbose=verbose))


app.command()(generate)
app.command()(checkpoint.push)


@app.command("eval")
def evaluate(
    run: RunArg,
    step: StepOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_NAME,…", help="Tasks of the lm-evaluation-harness instead: YAML files, or names it knows."
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="Round the masks of learned dropout otherwise than trained with: none, threshold, sample."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE[,…]",
            help="Other values than trained with, of a key that allows it: one each.",
            autocompletion=complete_changes,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the loss against the values of --set.")
    ] = None,
) -> None:
    """Validate a checkpoint over all held-out text, of all sources and of each, or evaluate a model on tasks.

    Examples: `duet eval runs/quickstart`, `duet eval exported --tasks mine.yaml,lambada_openai`,
    `duet eval runs/refined --set model.refine.steps=1,2,4,8 --plot steps.png`
    """
    changes = changes or []
    if plot and (tasks or not changes):
        raise ConfigError("--plot draws the validation loss against the values of --set KEY=A,B,…; give these")
    if tasks and rounding:
        raise ConfigError("--rounding is of the validation; leave it or --tasks out")
    if tasks is None and (plot or (changes and "," in changes[-1])):
        from pretrain.export.sweep import sweep

        if rounding:
            raise ConfigError("--rounding goes with one value of each --set; leave one of them out")
        for change, metrics in sweep(run, step, changes, plot).items():
            typer.echo("  ".join([change, *(f"{name} {value:.6f}" for name, value in metrics.items())]))
        return
    if tasks is None:
        from launch.progress import counted
        from pretrain.export.use import evaluate_run

        with counted("validating") as progress:
            found = evaluate_run(run, step, rounding, progress, changes)
        width = max(28, *map(len, found))
        for name, value in found.items():
            typer.echo(f"{name:<{width}} {value:.6f}")
        return
    with wanted("lm_eval", "lm-eval", "--tasks"):
        from pretrain.export.harness import evaluate_tasks

    for task, metrics in evaluate_tasks(run, step, tasks.split(","), changes).items():
        for name, value in metrics.items():
            typer.echo(f"{f'{task}/{name}':<42} {value:.6f}")


@app.command()
def embed(
    run: RunArg,
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="A text on each line; or JSON Lines, by its name.")],
    to: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the vectors go: a name that ends in .npy, .arrow or .jsonl.")
    ],
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON Lines.")] = "text",
    batch: Annotated[int, typer.Option(min=1, help="Texts that are computed together, if they are equally long.")] = 32,
    normalised: Annotated[bool, typer.Option("--normalised", help="Vectors of length 1.")] = False,
    step: StepOption = None,
) -> None:
    """Make a vector of each text: the mean over its tokens of the model's last states.

    Example: `duet embed runs/encoder texts.txt --to vectors.npy --normalised`
    """
    from data_pipeline.files.vectors import check_place, write_vectors
    from launch.progress import counted
    from pretrain.export.use import open_trained
    from pretrain.inference.embedding import read_texts, vectors

    check_place(to)
    given = read_texts(texts, text_key)
    with counted("embedding") as progress:
        found = vectors(open_trained(run, step), given, batch, normalised=normalised, progress=progress)
    write_vectors(to, found)
    typer.echo(f"{to}: {len(found):,} vectors of {found.shape[1]:,}")


@app.command()
def classify(
    run: RunArg,
    text: Annotated[list[str] | None, typer.Option(help="Text to say labels of; may be given several times.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Of a model that answers questions: what is asked about each --text.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one on each line; or JSON Lines, by its name.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON Lines.")] = "text",
    question_key: Annotated[str, typer.Option(help="Key of the question in JSON Lines.")] = "question",
    batch: Annotated[int, typer.Option(min=1, help="Texts that are computed together.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each text.")] = False,
    step: StepOption = None,
) -> None:
    """Say the label of each text, of what is in it, or where in it an answer stands, each with its probability.

    Examples: `duet classify runs/authors --text "It was a dark and stormy night."`,
    `duet classify runs/names --file texts.txt --json`,
    `duet classify runs/answers --question "Who wrote it?" --text "Middlemarch was written by George Eliot."`
    """
    from launch.progress import counted
    from pretrain.export.use import open_trained
    from pretrain.inference.classification import Asked, Classifier, read_asked, shown

    if not text and file is None:
        raise ConfigError("give --text TEXT, or --file FILE with a text on each line")
    if question is not None and not text:
        raise ConfigError("--question is asked about --text; in a --file each text has its own, under --question-key")
    classifier = Classifier(open_trained(run, step))
    asked = [Asked(one, question or "") for one in text or []]
    if file is not None:
        asked += read_asked(file, text_key, question_key if classifier.kind == "span" else None)
    with counted("classifying") as progress:
        found = classifier.told(asked, batch, progress)
    for one in found:
        typer.echo(shown(one, as_json))


@app.command()
def report(
    runs: Annotated[list[Path], run_argument(metavar="RUN…", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file; unless given, report.html in the run folder, or beside it for several."),
    ] = None,
) -> None:
    """Write a self-contained HTML report, a picture beside it, and one of each plot.

    Example: `duet report runs/quickstart`
    """
    from pretrain.report.report import write_report

    typer.echo(str(write_report(runs, out)))


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option("--dir", help="Where data and run go.")] = Path(),
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train.")] = 2,
) -> None:
    """From text that is already on this machine to a trained, tracked model, in a few minutes.

    Example: `duet quickstart --dir /tmp/first`
    """
    from launch.commands.quickstart import run

    raise typer.Exit(run(folder, ranks))


@config_app.command("show")
def config_show(config: ConfigArgs) -> None:
    """Print the configuration that these files, presets and overrides make.

    Example: `duet config show model/tiny run/quickstart optimizer.lr=3e-4`
    """
    from pretrain.config.schema import dump, load

    typer.echo(dump(load(config)), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration, for editors that complete and check YAML.

    A file names it in its first line: `# yaml-language-server: $schema=duet.schema.json`.

    Example: `duet config schema > duet.schema.json`
    """
    import json

    from pretrain.config.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@config_app.command("presets")
def config_presets() -> None:
    """List the shipped presets; `cluster/NAME` are sites, for `duet submit --cluster NAME`.

    Example: `duet config presets`
    """
    for name in shipped():
        typer.echo(name)


for command in (status.status, jobs.logs, jobs.cancel, jobs.requeue, jobs.resume):
    app.command()(command)


@contextmanager
def wanted(library: str, extra: str, by: str) -> Iterator[None]:
    """Say what to install when a library of an extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ConfigError(f"{by} needs the library {library}: pip install 'duet-pretrain[{extra}]'") from None


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, and so is a path that the system refuses."""
    # Else to look for garbage takes a tenth of the time of importing torch, and half as long as that at the end.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may be no text, and a terminal may lack a character
            stream.reconfigure(errors="backslashreplace")
    status_line.begin(" ".join(["duet", *sys.argv[1:2]]))
    with told(lambda error: print(f"error: {error}", file=sys.stderr)):
        try:
            check_code()
            if argument := argument_of_secret(sys.argv[1:], FREE_TEXT):
                raise ConfigError(f"command line: {argument}: {WAY_ON}")
            if key := dashed_key(sys.argv[1:]):
                raise ConfigError(f"command line: --{key}: write a key without dashes: {key}=VALUE")
            app()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            where = error.filename or "where this prints to"  # what goes into files is named
            print(f"error: {where}: {DISK_ERRORS[error.errno]}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
