"""`duet data`: from text to a dataset, and a look into one."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.data_plan import locate, plan

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig
    from data_pipeline.corpus import Progress
    from data_pipeline.dataset import Dataset
    from data_pipeline.manifest import Manifest

app = typer.Typer(
    no_args_is_help=True,
    help="Turn text into a dataset (tokenizer, Arrow shards, manifest), and look into one.",
)

ConfigArgs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG… KEY=VALUE…",
        help="YAML files or presets, then overrides such as data.tokenizer.vocab_size=8192.",
    ),
]
DatasetArg = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset's folder: data.path of its build.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was built from other data or settings.")]

_LINE_SECONDS = 10.0
_BAR_WIDTH = 40
_SAMPLE_TOKENS = 200
_NOTHING_TO_DO = "already built from this text and these settings: nothing to do"


@app.command()
def collect(
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl.zst", help="The file to write.")],
) -> None:
    """Write a small corpus that is on every machine: the documentation inside Python's standard library.

    Example: `duet data collect data/python-docs.jsonl.zst`
    """
    from data_pipeline.atomic import disk_errors
    from data_pipeline.errors import DataError
    from launch.python_docs import collect as collect_docs

    if not out.name.endswith(".jsonl.zst"):
        raise DataError(f"{out}: the file holds compressed JSON Lines, so its name must end in .jsonl.zst")
    with disk_errors(out):
        documents, size = collect_docs(out)
    typer.echo(f"{out}: {documents} documents, {_megabytes(size)} of text")


@app.command()
def tokenizer(config: ConfigArgs, overwrite: Overwrite = False) -> None:
    """Train the tokenizer only, and say how it does on the training text.

    Example: `duet data tokenizer data/python-docs data.tokenizer.type=bpe`
    """
    from data_pipeline.inspection import tokenizer_report
    from pretrain.config import load

    data = load(config).data
    with progress_line() as progress:
        report = tokenizer_report(data, progress, overwrite)
    typer.echo(f"tokenizer      {Path(data.path) / 'tokenizer' / 'spm.model'}")
    typer.echo(f"vocabulary     {report.vocab_size} pieces, type {data.tokenizer.type}, sha256 {report.sha256[:12]}")
    typer.echo(f"bytes a token  {report.bytes_per_token:.2f} (on {_megabytes(report.sample_bytes)} of training text)")
    typer.echo(f"coverage       {report.coverage:.4%} of the characters are in the vocabulary")
    typer.echo(f"unknown        {report.unknown_rate:.4%} of the tokens")
    typer.echo(f"longest        {'  '.join(map(repr, report.longest_pieces))}")


@app.command()
def build(
    config: ConfigArgs,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and written, and stop.")] = False,
) -> None:
    """Build the dataset: train the tokenizer if there is none, write the shards, publish the manifest.

    Built again from the same text and settings it does nothing; interrupted, it leaves the former state.

    Example: `duet data build data/characters 'data.sources.text.paths=[input.txt]'`
    """
    from data_pipeline.build import build as build_dataset
    from pretrain.config import load

    data = load(config).data
    if dry_run:
        _plan(data)
        return
    started = time.monotonic()
    with progress_line() as progress:
        manifest = build_dataset(data, progress, overwrite)
    _summary(data.path, manifest, time.monotonic() - started)


@app.command()
def inspect(
    dataset: DatasetArg,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show of each source.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Documents read for the histogram, of each split.")] = 100_000,
) -> None:
    """Show what a dataset holds: counts, how long its documents are, and some of them as the model sees them.

    Example: `duet data inspect data/python-docs --samples 5`
    """
    from data_pipeline.dataset import Dataset

    opened = Dataset.open(dataset)
    facts = opened.manifest
    typer.echo(f"fingerprint  {facts.fingerprint}")
    typer.echo(f"tokenizer    {facts.tokenizer.type}, {facts.tokenizer.vocab_size} pieces, tokens as {facts.dtype}")
    for source in facts.sources:
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items()) or "none"
        tokens = ", ".join(f"{count} tokens {split}" for split, count in source.tokens.items())
        typer.echo(
            f"source       {source.name}: {len(source.inputs)} files, {source.documents} documents, "
            f"{_megabytes(source.bytes)}, {tokens}; dropped: {dropped}; bytes replaced: {source.replaced}"
        )
    _split_lines(facts)
    _histograms(opened, limit)
    _samples(opened, samples)


@app.command()
def verify(
    dataset: DatasetArg,
    threads: Annotated[int, typer.Option(min=1, help="Shards that are read at a time.")] = 4,
) -> None:
    """Read a whole dataset and compare every hash and count; name a file that is damaged, swapped or missing.

    Exits with 0 if all is well, with 2 if not.

    Example: `duet data verify data/python-docs`
    """
    from data_pipeline.dataset import Dataset

    opened = Dataset.open(dataset)
    with progress_line() as progress:
        opened.verify(lambda done, total: progress("verify", done, total), threads)
    shards = opened.manifest.shards
    typer.echo(f"{dataset}: {len(shards)} shards, {_megabytes(sum(shard.bytes for shard in shards))}, all hashes match")


app.command()(plan)
app.command()(locate)


def _plan(data: "DataConfig") -> None:
    from data_pipeline.corpus import Corpus

    corpus = Corpus(data)
    for source in corpus.sources:
        typer.echo(f"read   {source.name}: {len(source.files)} files, {_megabytes(source.input_bytes)}")
        for file in source.files[:10]:
            typer.echo(f"       {file}")
        if len(source.files) > 10:
            typer.echo(f"       and {len(source.files) - 10} more")
    root = Path(data.path)
    for name, what in {
        "tokenizer": f"{data.tokenizer.type}, {data.tokenizer.vocab_size} pieces",
        "train": f"shards of {data.shard_tokens} tokens",
        "validation": f"split by {data.split.rule}",
        "manifest.json": "last",
    }.items():
        typer.echo(f"write  {root / name} ({what}{'; one is there' if (root / name).exists() else ''})")


def _summary(path: str, manifest: "Manifest", seconds: float) -> None:
    size = sum(split.bytes for split in manifest.splits.values())
    typer.echo(
        f"{path}: {_megabytes(size)} of text, {len(manifest.shards)} shards, "
        f"vocabulary {manifest.tokenizer.vocab_size}, {manifest.dtype}, {seconds:.1f} s"
    )
    _split_lines(manifest)
    for source in manifest.sources:
        for reason, count in source.dropped.items():
            typer.echo(f"dropped      {source.name}: {count} documents ({reason})")
        if source.replaced:
            typer.echo(f"replaced     {source.name}: {source.replaced} bytes that are not UTF-8 became U+FFFD")
    for name, split in manifest.splits.items():
        if split.unknown:
            typer.secho(
                f"WARNING      {name}: {split.unknown} tokens ({split.unknown / split.tokens:.4%}) stand for "
                "characters not in the vocabulary, which became <unk>: their text is lost. "
                "Raise data.tokenizer.sample_bytes or "
                "character_coverage, or add them to data.tokenizer.user_defined_symbols",
                fg="yellow",
                err=True,
            )
    typer.echo(f"fingerprint  {manifest.fingerprint}")


def _split_lines(manifest: "Manifest") -> None:
    for name, split in manifest.splits.items():
        line = f"{name:<12} {split.tokens} tokens, {split.documents} documents, {split.bytes} bytes"
        line += f" ({split.bytes / split.tokens:.2f} a token)"
        if split.byte_counts is not None:
            line += f", order-0 entropy {split.order0_entropy():.3f} bits a byte"
        typer.echo(line)


def _histograms(dataset: "Dataset", limit: int) -> None:
    from itertools import islice

    from data_pipeline.corpus import SPLITS
    from data_pipeline.inspection import documents, length_histogram

    for split in SPLITS:
        bins = length_histogram(sum(map(len, rows)) for rows in islice(documents(dataset, split), limit))
        first = f"first {limit} " if dataset.manifest.splits[split].documents > limit else ""
        typer.echo(f"\n{split}: tokens a document ({first}documents)")
        most = max(count for _, _, count in bins)
        for low, high, count in bins:
            typer.echo(f"{low:>10} - {high:<10} {count:>8} {'#' * -(-count * _BAR_WIDTH // most)}")


def _samples(dataset: "Dataset", samples: int) -> None:
    from itertools import islice

    from data_pipeline.inspection import documents

    tokenizer = dataset.tokenizer()
    for source in dataset.sources():
        for number, rows in enumerate(islice(documents(dataset, "train", source), samples)):
            length = sum(map(len, rows))
            shown = tokenizer.decode(rows[0][:_SAMPLE_TOKENS])
            more = " …" if length > _SAMPLE_TOKENS else ""
            typer.echo(f"\n{source}: train document {number}, {length} tokens:\n{shown}{more}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


@contextmanager
def progress_line() -> "Iterator[Progress]":
    """A live bar on a terminal, else a plain line every ten seconds, on standard error."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage == "unchanged":
                bars.console.print(_NOTHING_TO_DO)
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _plain_lines() -> Callable[[str, int, int], None]:
    stage_now, began, told = "", 0.0, 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal stage_now, began, told
        now = time.monotonic()
        if stage != stage_now:
            stage_now, began, told = stage, now, now
            if stage == "unchanged":
                typer.echo(_NOTHING_TO_DO, err=True)
        elif now - told >= _LINE_SECONDS:
            told = now
            speed = done / 1e6 / (now - began)
            typer.echo(f"{stage}: {_megabytes(done)} of {_megabytes(total)} read, {speed:.1f} MB/s", err=True)

    return show
