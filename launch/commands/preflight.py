"""`duet preflight`, and the first seconds of each job: `python -P -m launch.commands.preflight RUN_DIR CONFIG…`.

Slurm starts the second on every rank. Rank 0's exit code is the verdict, the others' is 0.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ConfigError, UserError
from launch.completion import complete_configs, complete_runs

if TYPE_CHECKING:
    from pretrain.preflight.exchange import Place
    from pretrain.preflight.verdict import Verdict
    from pretrain.run.job_records import JobFolder

GOOD, FAILED, STOP, AVOID = 0, 1, 2, 11
"""FAILED: the group broke, and no node can be named: try again. STOP: another try cannot mend it. AVOID: bad nodes are
excluded, start again without them."""
SCONTROL_SECONDS = 30
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def preflight(
    config: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG… KEY=VALUE…",
            help="What is to be trained: YAML files, presets, overrides.",
            autocompletion=complete_configs,
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Write bad nodes to this run's list of those to avoid.",
            autocompletion=complete_runs,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as JSON.")] = False,
) -> None:
    """Check this machine, or the nodes of an allocation under srun, before they train: seconds instead of a lost night.

    Example: `duet preflight model/tiny run/quickstart data.path=data/mine`
    """
    _leave(check(config, run, as_json))


def check(config: list[str], run: Path | None, as_json: bool = False) -> int:
    """One rank's part; rank 0 prints the verdict and writes bad nodes down.

    Returns:
        the exit code.

    Raises:
        UserError: the configuration cannot be used, or rank 0 cannot be reached.
    """
    from pretrain.config.schema import load

    loaded = load(config)
    from pretrain.preflight.exchange import Place
    from pretrain.preflight.group import Limits, open_store, preflight
    from pretrain.run.job_records import JobFolder

    place = place_of(os.environ, Place)
    limits = Limits()
    planned = planned_nodes(os.environ) if place.rank == 0 else []
    verdict = preflight(loaded, place, open_store(place, limits), planned, limits)
    if verdict is None:
        return GOOD
    code, refusal = conclude(verdict, JobFolder(run) if run else None)
    if as_json:
        typer.echo(json.dumps(asdict(verdict) | {"exit_code": code, "refusal": refusal}, indent=1))
    else:
        typer.echo(describe(verdict, code, refusal))
    return code


def conclude(verdict: "Verdict", folder: "JobFolder | None") -> tuple[int, str | None]:
    """The exit code, and why bad nodes were not excluded. Writes to the run's list, and what failed for the policy."""
    from launch.slurm.exclude import exclude
    from pretrain.run.job_records import RankFailure, this_job

    if verdict.good:
        return GOOD, None
    code, refusal = FAILED, None
    if verdict.shared:
        code = STOP
    elif verdict.bad:
        reasons = {node: "; ".join(why) for node, why in verdict.bad.items()}
        refusal = exclude(folder, reasons, len(verdict.nodes)) if folder else "no run was given (--run)"
        code = STOP if refusal else AVOID
    job, restart = this_job()
    if folder and job:
        what = "preflight: " + "; ".join(_failures(verdict) + ([refusal] if refusal else []))
        folder.rank_failed(RankFailure(job, restart, 0, socket.gethostname(), what, mistake=code == STOP))
    return code, refusal


def describe(verdict: "Verdict", code: int, refusal: str | None) -> str:
    """The verdict in lines: what was measured, then warnings, then what stops the job."""
    width = max((len(name) for name in verdict.measured), default=0)
    lines = [
        f"preflight of {len(verdict.nodes)} node(s), {verdict.num_ranks} rank(s), {verdict.seconds:.1f} s",
        *(f"  {name:<{width}}  {text}" for name, text in verdict.measured.items()),
        *(f"warning: {text}" for text in verdict.warnings),
        *(f"error: {text}" for text in _failures(verdict)),
    ]
    if code == AVOID:
        lines.append(f"{', '.join(verdict.bad)}: excluded for a day; start again without")
    elif refusal:
        lines.append(f"no node is excluded: {refusal}")
    elif code == STOP:
        lines.append("no node is excluded: what all nodes share is the fault of none")
    elif code == GOOD:
        lines.append("preflight is good")
    return "\n".join(lines)


def _failures(verdict: "Verdict") -> list[str]:
    bad = [f"bad node {node}: {'; '.join(reasons)}" for node, reasons in verdict.bad.items()]
    return [*verdict.shared, *verdict.exchange, *bad]


def place_of(environment: Mapping[str, str], make: "type[Place]") -> "Place":
    """This process's place, from RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE or srun's variables; else alone."""

    def number(name: str, slurm: str, default: int) -> int:
        return int(environment.get(name) or environment.get(slurm) or default)

    rank = number("RANK", "SLURM_PROCID", 0)
    world_size = number("WORLD_SIZE", "SLURM_NTASKS", 1)
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = number("GROUP_RANK", "SLURM_NODEID", 0)
    return make(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK", "SLURM_LOCALID", 0),
        local_size=number("LOCAL_WORLD_SIZE", "", tasks[node] if node < len(tasks) else 1),
        node=environment.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
    )


def tasks_per_node(text: str) -> list[int]:
    """Of Slurm's `2(x3),1`: 2, 2, 2, 1."""
    return [int(tasks) for tasks, times in _TASKS.findall(text) for _ in range(int(times or 1))]


def planned_nodes(environment: Mapping[str, str]) -> list[str]:
    """The node of each rank, in blocks as srun places them; empty where Slurm does not tell."""
    nodes, tasks = (
        environment.get("SLURM_STEP_NODELIST"),
        tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "")),
    )
    if not nodes:
        return []
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):  # in a container; a node that does not come has no name then
        return []
    return [name for name, count in zip(names, tasks, strict=False) for _ in range(count)]


def main(args: list[str]) -> int:
    """What srun starts on each rank: RUN_DIR, then the configuration."""
    try:
        return check(args[1:], Path(args[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP if isinstance(error, ConfigError) else FAILED  # without rank 0 there is no verdict


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check may hang in a driver for ever, and gloo's threads abort an orderly exit now and then


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
