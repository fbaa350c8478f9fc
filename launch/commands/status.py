"""`duet status`: how runs stand, in the queue and in their folders."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.commands.runs import aligned
from launch.completion import complete_runs

if TYPE_CHECKING:
    from launch.slurm.run_status import Status

COLUMNS = ("RUN", "STATE", "JOB", "NODES", "STEP", "DONE", "LOSS", "TOKENS/S", "SAVED", "RESTARTS", "RUN ENDS", "WHY")
MOST_WHY = 60
"""Characters of a reason in the table."""
FAILURES_SHOWN = 3


def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN|FOLDER", help="Runs, and folders of them; runs unless given.", autocompletion=complete_runs
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="How often --watch looks.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say how runs stand in Slurm's queue and in their folders; all there is to say when one is named.

    Without Slurm the run folders alone tell.

    Examples: `duet status`, `duet status runs/first --watch`
    """
    paths = runs or [Path("runs")]
    if not watch:
        typer.echo(_as_json(paths) if as_json else _text(paths))
        return
    _watch(lambda: _as_json(paths) if as_json else _text(paths), every)


def _text(paths: list[Path]) -> str:
    from launch.slurm.run_status import statuses
    from pretrain.run.run_listing import is_run

    found, problem = statuses(paths)
    _check_found(paths, found)
    now = time.time()
    single = len(found) == 1 and len(paths) == 1 and is_run(paths[0])
    lines = _block(found[0], now) if single else aligned([COLUMNS, *(_row(one, now) for one in found)])
    if not found:
        lines = [f"{path}: no runs in it" for path in paths]
    return "\n".join([*lines, *([_printable(problem)] if problem else [])])


def _check_found(paths: list[Path], found: "list[Status]") -> None:
    """Raises RunError where there is no run, and one of the folders is something else of ours."""
    from data_pipeline.errors import RunError
    from data_pipeline.places import RUN, mistaken

    told = [f"{path}: {why}" for path in paths if (why := mistaken(path, RUN))]
    if told and not found:
        raise RunError("\n".join(told))


def _as_json(paths: list[Path]) -> str:
    from launch.slurm.run_status import statuses

    found, problem = statuses(paths)
    _check_found(paths, found)
    content = {"slurm": problem or "asked", "runs": [asdict(one) for one in found]}
    return json.dumps(_strict(content), indent=1, ensure_ascii=False)


def _watch(text: Callable[[], str], every: float) -> None:
    """On a terminal on a screen of its own, else below each other."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    terminal = Console(highlight=False)
    shown = ""
    try:
        if not terminal.is_terminal or terminal.is_dumb_terminal:
            while True:
                typer.echo(f"{datetime.now():%F %T}\n{text()}\n")
                time.sleep(every)
        with Live(console=terminal, screen=True, auto_refresh=False) as live:
            while True:
                shown = text()
                live.update(Text(f"{datetime.now():%F %T}   Ctrl-C ends\n\n{shown}", no_wrap=True), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        if shown:
            typer.echo(shown)  # the other screen is gone


def _row(one: "Status", now: float) -> tuple[str, ...]:
    return tuple(
        map(
            _printable,
            (
                one.run,
                one.state,
                one.job or "-",
                "-" if one.node_count is None else str(one.node_count),
                _step(one),
                _share(one),
                "-" if one.loss is None else f"{one.loss:.4f}",
                "-" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}",
                "-" if one.checkpoint is None else f"{one.checkpoint}",
                str(one.restarts),
                "-" if one.run_ends is None else _moment(one.run_ends, now),
                one.why if len(one.why) <= MOST_WHY else one.why[: MOST_WHY - 1] + "…",
            ),
        )
    )


def _block(one: "Status", now: float) -> list[str]:
    """A line for each thing there is to say."""
    from launch.slurm.run_status import told

    job = f"{one.job}{f' ({one.job_state})' if one.job_state else ''}" if one.job else ""
    more = f", then {', '.join(one.more_jobs)}" if one.more_jobs else ""
    nodes = f"{one.nodes} ({one.node_count})" if one.nodes else (str(one.node_count) if one.node_count else "")
    left = "" if one.time_left is None or not one.live else f", {_duration(one.time_left)} left of the job"
    progress = "" if one.step is None else f"{_step(one)} ({_share(one)})"
    age = "" if one.last_step is None else f", {_duration(now - one.last_step)} ago"
    saved = ""
    if one.checkpoint is not None and one.checkpoint_time is not None:
        saved = f"step {one.checkpoint}, {_duration(now - one.checkpoint_time)} ago"
    requeued = f", this job was requeued {one.restarts} times" if one.job else ""
    rows = [
        ("run", one.run),
        ("state", f"{one.state}{f' ({one.why})' if one.why else ''}"),
        ("job", job + more),
        ("submitted", _moment(one.submitted, now)),
        ("starts", f"{_moment(one.starts, now)}, Slurm expects" if one.starts else ""),
        ("nodes", nodes),
        ("step", progress + age if progress else ""),
        ("loss", "" if one.loss is None else f"{one.loss:.4f}"),
        ("tokens/s", "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"),
        ("checkpoint", saved),
        ("attempts", f"{one.attempts}{requeued}" if one.attempts else ""),
        (
            "job ends" if one.job_ends and one.job_ends > now else "job ended",
            f"{_moment(one.job_ends, now)}{left}" if one.job_ends else "",
        ),
        ("run ends", f"{_moment(one.run_ends, now)} at this speed" if one.run_ends else ""),
        ("decided", _decision(one, now)),
        *(("avoided", f"{node.get('node')}: {node.get('reason')}") for node in one.excluded),
        *(("failed", f"{_moment(failure.time, now)}: {told(failure)}") for failure in one.failures[-FAILURES_SHOWN:]),
    ]
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {_printable(text)}" for label, text in rows if text]


def _decision(one: "Status", now: float) -> str:
    if not one.decision:
        return ""
    action = str(one.decision.get("action")).lower().replace("_", " ")
    return f"{_moment(one.decision.get('time'), now)}: {action}: {one.decision.get('reason')}"


def _step(one: "Status") -> str:
    if one.step is None:
        return "-"
    return f"{one.step}/{one.total}" if one.total else str(one.step)


def _share(one: "Status") -> str:
    return "-" if one.step is None or not one.total else f"{one.step / one.total:.0%}"


def _moment(when: float | None, now: float) -> str:
    """The clock's time, with the date unless it is today's."""
    if when is None:
        return ""
    moment, today = datetime.fromtimestamp(when), datetime.fromtimestamp(now)
    return f"{moment:%H:%M:%S}" if moment.date() == today.date() else f"{moment:%F %H:%M}"


def _duration(seconds: float) -> str:
    from pretrain.tracking.durations import duration

    return duration(max(0.0, seconds))


def _printable(text: str) -> str:
    """What a failing rank said must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _strict(content: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
