"""`duet data`: from text to a dataset, and a look into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.data_build import build, split_lines, tokenizer, weight_line
from launch.commands.data_plan import locate, plan
from launch.progress import megabytes, progress_line

if TYPE_CHECKING:
    from data_pipeline.storage.dataset import Dataset

app = typer.Typer(
    no_args_is_help=True,
    help="Turn text into a dataset (tokenizer, Arrow shards, manifest), and look into one.",
)

DatasetArg = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="A dataset's folder, data.path of its build; or a URI (s3://, gs://, …)."),
]

_BAR_WIDTH = 40
_SAMPLE_TOKENS = 200


@app.command()
def collect(
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl.zst", help="The file to write.")],
) -> None:
    """Write a small corpus that is on every machine: the documentation inside Python's standard library.

    Example: `duet data collect data/python-docs.jsonl.zst`
    """
    from data_pipeline.errors import DataError
    from data_pipeline.files.atomic import disk_errors
    from launch.commands.python_docs import collect as collect_docs

    if not out.name.endswith(".jsonl.zst"):
        raise DataError(f"{out}: the file holds compressed JSON Lines, so its name must end in .jsonl.zst")
    with disk_errors(out):
        documents, size = collect_docs(out)
    typer.echo(f"{out}: {documents} documents, {megabytes(size)} of text")


app.command()(tokenizer)
app.command()(build)


@app.command()
def inspect(
    dataset: DatasetArg,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show of each source.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Documents read for the histogram, of each split.")] = 100_000,
) -> None:
    """Show what a dataset holds: counts, how long its documents are, and some of them as the model sees them.

    Example: `duet data inspect data/python-docs --samples 5`
    """
    from data_pipeline.storage.dataset import Dataset

    opened = Dataset.open(dataset)
    facts = opened.manifest
    typer.echo(f"fingerprint  {facts.fingerprint}")
    if facts.pairs:
        typer.echo("documents    pairs of source and target")
    typer.echo(f"tokenizer    {facts.tokenizer.type}, {facts.tokenizer.vocab_size} pieces, tokens as {facts.dtype}")
    for source in facts.sources:
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items()) or "none"
        tokens = ", ".join(f"{count} tokens {split}" for split, count in source.tokens.items())
        typer.echo(
            f"source       {source.name}: {len(source.inputs)} files, {source.documents} documents, "
            f"{megabytes(source.bytes)}, {tokens}; dropped: {dropped}; bytes replaced: {source.replaced}"
        )
    split_lines(facts)
    weight_line(facts)
    _packed(opened)
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
    from data_pipeline.sampling.packing_plan import plans
    from data_pipeline.storage.dataset import Dataset
    from data_pipeline.storage.remote_shards import unused_cache

    with unused_cache(dataset, threads + 1) as cache, progress_line() as progress:
        opened = Dataset.open(dataset, cache=cache)
        opened.verify(lambda done, total: progress("verify", done, total), threads)
    for _, packed in plans(opened):
        packed.check()
    shards = opened.manifest.shards
    typer.echo(f"{dataset}: {len(shards)} shards, {megabytes(sum(shard.bytes for shard in shards))}, all hashes match")


@app.command()
def upload(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset's folder: data.path of its build.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="Where to: s3://bucket/folder, gs://…")],
) -> None:
    """Copy a dataset into an object store, from which `duet train` reads it through a cache on each node.

    The manifest goes last, so a dataset is there when it is complete. Interrupted, run it again: what is there stays.

    Example: `duet data upload data/python-docs s3://bucket/python-docs`
    """
    from data_pipeline.errors import DataError
    from data_pipeline.files.filesystem import is_uri
    from data_pipeline.storage.remote_shards import upload as send

    if not is_uri(uri):
        raise DataError(f"{uri} is no URI, such as s3://bucket/folder; a folder can be copied by cp")
    typer.echo(f"{uri}: {send(dataset, uri)} shards copied")


app.command()(plan)
app.command()(locate)


def _packed(dataset: "Dataset") -> None:
    """What `duet data plan`, or a run, has packed."""
    from data_pipeline.sampling.packing_plan import plans

    for name, packed in plans(dataset):
        facts = packed.facts
        typer.echo(
            f"packed       {name}: context {packed.context}: {facts.windows} windows, {packed.padding:.2%} padding, "
            f"{facts.documents} documents, {facts.cut} of them longer than a window"
        )


def _histograms(dataset: "Dataset", limit: int) -> None:
    from itertools import islice

    from data_pipeline.ingest.splits import SPLITS
    from data_pipeline.inspection.statistics import documents, length_histogram

    for split in SPLITS:
        bins = length_histogram(sum(map(len, rows)) for rows in islice(documents(dataset, split), limit))
        first = f"first {limit} " if dataset.manifest.splits[split].documents > limit else ""
        typer.echo(f"\n{split}: tokens a document ({first}documents)")
        most = max(count for _, _, count in bins)
        for low, high, count in bins:
            typer.echo(f"{low:>10} - {high:<10} {count:>8} {'#' * -(-count * _BAR_WIDTH // most)}")


def _samples(dataset: "Dataset", samples: int) -> None:
    from itertools import islice

    import numpy as np

    from data_pipeline.inspection.statistics import documents

    tokenizer = dataset.tokenizer()
    for source in dataset.sources():
        for number, rows in enumerate(islice(documents(dataset, "train", source), samples)):
            length = sum(map(len, rows))
            texts = [rows[0]]
            if dataset.manifest.pairs:
                ends = rows[0] == tokenizer.eos_id
                texts = [part for part in np.split(rows[0], [int(ends.argmax()) + 1]) if len(part)]
            shown = "\n⟶ ".join(tokenizer.decode(text[:_SAMPLE_TOKENS]) for text in texts)
            more = " …" if any(len(text) > _SAMPLE_TOKENS for text in texts) or len(rows) > 1 else ""
            typer.echo(f"\n{source}: train document {number}, {length} tokens:\n{shown}{more}")
