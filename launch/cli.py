"""`duet`: the command line. Each command imports what it runs inside its own function."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UserError
from launch import checkpoint, data, jobs, logs, model, preflight, runs, status, submit_command, tracking
from launch.completion import complete_configs, complete_runs

ConfigArgs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG… KEY=VALUE…",
        help="YAML files or presets, then overrides such as optimizer.lr=3e-4.",
        autocompletion=complete_configs,
    ),
]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_runs)]
StepOption = Annotated[int | None, typer.Option("--step", help="Use the checkpoint of this step, not the newest.")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Duet: pretrain parallel encoder-decoders with learned dropout, and what they are compared with.",
)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(model.app, name="model")
app.add_typer(runs.app, name="runs")
app.add_typer(tracking.app, name="track")
app.command("submit")(submit_command.submit)
app.command("preflight")(preflight.preflight)
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")


@app.command()
def train(
    config: ConfigArgs,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine: one for each GPU.")] = 1,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN[@STEP]", help="Begin with a checkpoint of another run, or its newest."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what DeepSpeed and torch print, too.")] = False,
) -> None:
    """Train, or go on from the newest checkpoint of the run folder.

    Example: `duet train model/tiny run/quickstart data.path=data/python-docs --ranks 2`

    With --from it is a new run of the other's configuration, changed by what is given: for instance
    `duet train --from runs/a@9000 run.name=a-cooled schedule.kind=wsd schedule.cooldown=1000 train.steps=10000`.
    """
    from pretrain.config import load

    if start_from:
        from pretrain.origin import parse
        from pretrain.run import RunFolder

        origin = RunFolder(parse(start_from)[0])
        origin.facts()  # a run folder
        config = [str(origin.config_file), *config, f"run.start_from={start_from}"]
    loaded = load(config)
    loaded.micro_batches(ranks)
    if dry_run:
        from launch.dry_run import describe

        typer.echo(describe(loaded, ranks))
        return
    from launch.local import run_ranks

    raise typer.Exit(run_ranks(config, ranks, loaded.run_dir / "logs", verbose=verbose))


@app.command("eval")
def evaluate(run: RunArg, step: StepOption = None) -> None:
    """Validate a checkpoint over all held-out text: of all sources, and of each.

    Example: `duet eval runs/quickstart`
    """
    from pretrain.use import evaluate_run

    metrics = evaluate_run(run, step)
    width = max(28, *map(len, metrics))
    for name, value in metrics.items():
        typer.echo(f"{name:<{width}} {value:.6f}")


@app.command()
def generate(
    run: RunArg,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to continue, one on each line; empty lines are left out.")
    ] = None,
    step: StepOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most, for each text.")] = 200,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="Divides the logits; 0 is --greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0: among all.")] = 50,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Choose among the fewest tokens that have this probability together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave out tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that the text holds already become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this string; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue texts; several are computed side by side, and the first is shown while it grows.

    Examples: `duet generate runs/quickstart --prompt "Return the "`,
    `duet generate runs/quickstart --prompts prompts.txt --top-k 0 --top-p 0.9 --stop "."`
    """
    from model.sampling import Sampling
    from pretrain.text import read_prompts
    from pretrain.use import generate_texts

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])] or [""]
    sampling = Sampling(repetition_penalty, 0.0 if greedy else temperature, top_k or None, top_p, min_p)
    later = [""] * len(texts)
    if len(texts) > 1:
        typer.echo(f"== 1 of {len(texts)} ==")
    for number, piece in generate_texts(run, step, texts, sampling, tokens=tokens, stops=stop or [], seed=seed):
        if number:
            later[number] += piece
        else:
            typer.echo(piece, nl=False)
    typer.echo()
    for number, text in enumerate(later[1:], 2):
        typer.echo(f"== {number} of {len(texts)} ==\n{text}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file; unless given, report.html in the run folder, or beside it for several."),
    ] = None,
) -> None:
    """Write a self-contained HTML report, a picture beside it, and one of each plot.

    Example: `duet report runs/quickstart`
    """
    from pretrain.report import write_report

    typer.echo(str(write_report(runs, out)))


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option("--dir", help="Where data and run go.")] = Path(),
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train.")] = 2,
) -> None:
    """From text that is already on this machine to a trained, tracked model, in a few minutes.

    Example: `duet quickstart --dir /tmp/first`
    """
    from launch.quickstart import run

    raise typer.Exit(run(folder, ranks))


@config_app.command("show")
def config_show(config: ConfigArgs) -> None:
    """Print the configuration that these files, presets and overrides make.

    Example: `duet config show model/tiny run/quickstart optimizer.lr=3e-4`
    """
    from pretrain.config import dump, load

    typer.echo(dump(load(config)), nl=False)


@config_app.command("presets")
def config_presets() -> None:
    """List the shipped presets; `cluster/NAME` are sites, for `duet submit --cluster NAME`.

    Example: `duet config presets`
    """
    from launch.cluster import shipped
    from pretrain.config import presets

    for name in sorted([*presets(), *(f"cluster/{name}" for name in shipped())]):
        typer.echo(name)


for command in (status.status, logs.logs, jobs.cancel, jobs.requeue, jobs.resume):
    app.command()(command)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
