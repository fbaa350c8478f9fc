"""`duet submit`: the command."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ConfigError
from launch.completion import complete_configs

if TYPE_CHECKING:
    from launch.slurm.submit import Submission
    from pretrain.config.schema import Config


def submit(
    config: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG… KEY=VALUE…",
            help="As for `duet train`.",
            autocompletion=complete_configs,
        ),
    ],
    cluster: Annotated[
        str, typer.Option("--cluster", metavar="NAME", help="The site: a preset, one of your own, or a YAML file.")
    ],
    nodes: Annotated[str | None, typer.Option(help="Nodes, or a range such as 2-8; the site's unless given.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of a job; the site's unless given.")] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2,…", help="A run for each value; given several times, for each combination."),
    ] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs, each after the one before, where a site does not requeue.")
    ] = 1,
    after: Annotated[
        str | None, typer.Option(metavar="JOB", help="Start when this job has succeeded; it may make the dataset.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="A further option of sbatch, such as --sbatch=--hold; the last word."),
    ] = None,
    untracked_mib: Annotated[
        float, typer.Option(min=0.0, help="What files that git does not know may add to the copy of the code, in MiB.")
    ] = 10.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the script and what was checked; write and submit nothing.")
    ] = False,
) -> None:
    """Submit a run to Slurm, checked before it waits in a queue; it runs on a copy of the code as it is now.

    Examples: `duet submit model/tiny run/quickstart data.path=data/mine --cluster gpu --nodes 2 --dry-run`,
    `duet submit base.yaml --cluster mine --array optimizer.lr=1e-3,3e-4 --array run.seed=1,2`
    """
    from launch.slurm.submit import Order, place, prepare, site

    configs = _configs(config, array, chain, after)
    where = site(cluster, nodes, time)
    order = Order(
        configs,
        where.shown() if dry_run else where,
        str(Path(cluster).absolute()) if Path(cluster).is_file() else cluster,
        ["duet", *sys.argv[1:]],
        array=bool(array),
        chain=chain,
        after=after,
        options=sbatch or (),
        untracked_mib=untracked_mib,
    )
    if dry_run:
        _show(prepare(order, dry_run=True))
    else:
        place(order)


def _configs(config: list[str], array: list[str] | None, chain: int, after: str | None) -> "list[Config]":
    """Of all runs. Raises ConfigError for options that cannot be."""
    from launch.slurm.sweep import expand
    from pretrain.config.schema import load

    if array and chain > 1:
        raise ConfigError("--array and --chain exclude each other: chain each run on its own")
    if after and not re.fullmatch(r"\d+(_\d+)?", after):
        raise ConfigError(f"--after {after}: expected the number of a job, such as 1234")
    return expand(config, array) if array else [load(config)]


def _show(plan: "Submission") -> None:
    """What would be submitted."""
    from launch.slurm.submit import show

    typer.echo(plan.script, nl=False)
    show(plan.findings)
    typer.echo("nothing was written or submitted, and Slurm was not asked (--dry-run)", err=True)
