"""Progress of long work, on standard error: a live bar on a terminal, plain lines else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from data_pipeline.ingest.splits import Progress

_LINE_SECONDS = 10.0
_AT_ONCE = {"train": "training the tokenizer"}
"""Stages whose end is all that is known of how far they are, and what they are called."""
_NOTHING_TO_DO = "already built from this text and these settings: nothing to do"


def megabytes(size: int) -> str:
    """A size in 10^6 bytes, as text."""
    return f"{size / 1e6:.2f} MB"


@contextmanager
def progress_line() -> "Iterator[Progress]":
    """A live bar on a terminal, else a plain line every ten seconds, on standard error."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    told = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:<9}"), BarColumn(24), *told, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}
        at_once: dict[TaskID, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage == "unchanged":
                bars.console.print(_NOTHING_TO_DO)
                return
            if stage in tasks:
                bars.update(tasks[stage], completed=done)
                return
            for task, size in at_once.items():
                bars.update(task, total=size, completed=size)
            at_once.clear()
            name, known = _AT_ONCE.get(stage, stage), None if stage in _AT_ONCE else total
            tasks[stage] = bars.add_task(name, total=known, completed=done)
            if stage in _AT_ONCE:
                at_once[tasks[stage]] = total

        yield show


def _plain_lines() -> Callable[[str, int, int], None]:
    stage_now, began, told, first = "", 0.0, 0.0, 0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal stage_now, began, told, first
        now = time.monotonic()
        if stage != stage_now:
            stage_now, began, told, first = stage, now, now, done
            if stage == "unchanged":
                typer.echo(_NOTHING_TO_DO, err=True)
            if stage in _AT_ONCE:
                typer.echo(f"{_AT_ONCE[stage]} on {megabytes(total)}, which may take minutes", err=True)
        elif now - told >= _LINE_SECONDS:
            told = now
            speed = max(done - first, 1) / (now - began)
            left = timedelta(seconds=round((total - done) / speed))
            typer.echo(
                f"{stage}: {megabytes(done)} of {megabytes(total)}, {speed / 1e6:.1f} MB/s, {left} left", err=True
            )

    return show


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of equal pieces of work, told how many are done before each, and of how many: a bar with the time left
    on a terminal, else a plain line every ten seconds, on standard error."""
    if not sys.stderr.isatty():
        yield _plain_counts(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _plain_counts(what: str) -> Callable[[int, int], None]:
    began, told = 0.0, 0.0

    def show(done: int, total: int) -> None:
        nonlocal began, told
        now = time.monotonic()
        if not done:
            began = told = now
        elif now - told >= _LINE_SECONDS:
            told = now
            left = timedelta(seconds=round((total - done) * (now - began) / done))
            typer.echo(f"{what}: {done / total:.0%}, {left} left", err=True)

    return show
