"""`duet data`: from text to a dataset, and a look into one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.data_plan import locate, plan
from launch.completion import complete_configs
from launch.progress import megabytes, progress_line
from pretrain import status_line

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.config import DataConfig
    from data_pipeline.storage.dataset import Dataset
    from data_pipeline.storage.manifest import Manifest

ConfigArgs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG… KEY=VALUE…",
        help="YAML files or presets, then overrides such as data.tokenizer.vocab_size=8192.",
        autocompletion=complete_configs,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that work at once; all CPUs unless given. The result is the same.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was built from other data or settings.")]


def tokenizer(config: ConfigArgs, overwrite: Overwrite = False, processes: Processes = None) -> None:
    """Train the tokenizer only, and say how it does on the training text.

    Example: `duet data tokenizer data/python-docs data.tokenizer.type=bpe`
    """
    from data_pipeline.building.process_pool import available_cpus
    from data_pipeline.inspection.tokenizer_report import tokenizer_report
    from pretrain.config.schema import load

    data = load(config).data
    with progress_line() as progress:
        report = tokenizer_report(data, progress, overwrite, processes or available_cpus())
    typer.echo(f"tokenizer      {Path(data.path) / 'tokenizer'}")
    kind = data.tokenizer.model or f"type {data.tokenizer.type}"
    typer.echo(f"vocabulary     {report.vocab_size} pieces, {kind}, sha256 {report.sha256[:12]}")
    for name, found in report.sources.items():
        typer.echo(f"\nsource         {name}, a sample of {megabytes(found.sample_bytes)} of training text")
        typer.echo(f"bytes a token  {found.bytes_per_token:.2f}")
        typer.echo(f"coverage       {found.coverage:.4%} of the characters are in the vocabulary")
        typer.echo(f"unknown        {found.unknown_rate:.4%} of the tokens")
        typer.echo(f"round trip     {found.round_trip:.4%} of the samples come back as they were")
        typer.echo(f"longest        {'  '.join(map(repr, found.longest_pieces))}")


def build(
    config: ConfigArgs,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and written, and stop.")] = False,
    processes: Processes = None,
    list_dropped: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every document that is left out, a line of JSON each.")
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="On many machines, first: all but the tokenizing, once.")
    ] = False,
    task: Annotated[int | None, typer.Option(min=0, help="Then, in each of --tasks: the share of this one.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="How many tasks share the tokenizing.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Last: write the shards, publish the manifest.")] = False,
) -> None:
    """Build the dataset: train the tokenizer if there is none, write the shards, publish the manifest.

    Built again from the same text and settings it does nothing; interrupted, it leaves the former state, and goes on
    where it was when it is run again.

    Example: `duet data build data/characters 'data.sources.text.paths=[input.txt]'`
    """
    from data_pipeline.building import api as builds
    from data_pipeline.building.process_pool import available_cpus
    from pretrain.config.schema import load

    _check_steps(overwrite, list_dropped, prepare, task, tasks, merge)
    data = load(config).data
    if dry_run:
        _plan(data)
        return
    started = time.monotonic()
    cpus = processes or available_cpus()
    notes: list[str] = []
    with progress_line() as progress:
        if prepare:
            units = builds.prepare(data, progress, cpus, notes.append)
            _echo(notes)
            typer.echo(f"{data.path}: the tokenizer is there, and {units} units are to be tokenized")
            return
        if task is not None and tasks is not None:
            units = builds.build_task(data, task, tasks, progress, cpus)
            typer.echo(f"{data.path}: task {task} of {tasks} is done, {units} units")
            return
        if merge:
            manifest = builds.merge(data, progress, cpus, list_dropped, notes.append)
        else:
            manifest = builds.build(data, progress, overwrite, cpus, list_dropped, notes.append)
    _summary(data.path, manifest, time.monotonic() - started, notes)


def _echo(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _check_steps(
    overwrite: bool, list_dropped: Path | None, prepare: bool, task: int | None, tasks: int | None, merge: bool
) -> None:
    if (task is None) != (tasks is None):
        raise typer.BadParameter("--task and --tasks need each other")
    if task is not None and tasks is not None and task >= tasks:
        raise typer.BadParameter(f"--task={task} is none of --tasks={tasks}: they are 0 to {tasks - 1}")
    if prepare + merge + (task is not None) > 1:
        raise typer.BadParameter("--prepare, --task and --merge are three steps, one after the other")
    if overwrite and (prepare or merge or task is not None):
        raise typer.BadParameter("--overwrite is for a build at once; for tasks choose another data.path")
    if list_dropped is not None and (prepare or task is not None):
        raise typer.BadParameter("--list-dropped belongs to the last step, --merge")


def _plan(data: "DataConfig") -> None:
    from data_pipeline.ingest.sources import named
    from data_pipeline.ingest.splits import Corpus

    corpus = Corpus(data)
    for source in corpus.sources:
        typer.echo(f"read   {source.name}: {len(source.files)} files, {megabytes(source.input_bytes)}")
        for file in source.files[:10]:
            typer.echo(f"       {file}")
        if len(source.files) > 10:
            typer.echo(f"       and {len(source.files) - 10} more")
        empty = [file for file, (size, _) in zip(source.files, source.stamps, strict=True) if not size]
        for what, places in (("left out", source.left_out), ("empty", empty)):
            if places:
                typer.echo(named(what, source.name, places))
    root = Path(data.path)
    for name, what in {
        "tokenizer": f"{data.tokenizer.type}, {data.tokenizer.vocab_size} pieces",
        "train": f"shards of {data.shard_tokens} tokens",
        "validation": f"split by {data.split.rule}",
        "manifest.json": "last",
    }.items():
        typer.echo(f"write  {root / name} ({what}{'; one is there' if (root / name).exists() else ''})")


def _summary(path: str, manifest: "Manifest", seconds: float, notes: list[str]) -> None:
    size = sum(split.bytes for split in manifest.splits.values())
    typer.echo(
        f"{path}: {megabytes(size)} of text, {len(manifest.shards)} shards, "
        f"vocabulary {manifest.tokenizer.vocab_size}, {manifest.dtype}, {seconds:.1f} s"
    )
    split_lines(manifest)
    _echo(notes)
    weight_line(manifest)
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


def weight_line(manifest: "Manifest") -> None:
    """Says how often a run reads each source, if the dataset was built with weights."""
    if manifest.weights:
        shares = ", ".join(f"{name} {weight:g}" for name, weight in manifest.weights.items())
        typer.echo(f"weights      {shares}: a run reads so unless it has weights of its own")


def split_lines(manifest: "Manifest") -> None:
    """Says what each split holds."""
    for name, split in manifest.splits.items():
        line = f"{name:<12} {split.tokens} tokens, {split.documents} documents, {split.bytes} bytes"
        line += f" ({split.bytes / split.tokens:.2f} a token)"
        if split.byte_counts is not None:
            line += f", order-0 entropy {split.order0_entropy():.3f} bits a byte"
        typer.echo(line)


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
    """Write a small corpus that is on every machine: the prose of the documentation inside Python's standard library.

    Example: `duet data collect data/python-docs.jsonl.zst`
    """
    from data_pipeline.errors import DataError
    from data_pipeline.files.atomic import disk_errors
    from launch.commands.quickstart import collect as collect_docs

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
    from data_pipeline.config import told_names
    from data_pipeline.storage.dataset import Dataset

    opened = Dataset.open(dataset)
    facts = opened.manifest
    typer.echo(f"fingerprint  {facts.fingerprint}")
    if facts.pairs:
        typer.echo("documents    pairs of source and target")
    if facts.chat_template is not None:
        typer.echo(f"documents    conversations, each message as {facts.chat_template!r}")
    if facts.labels is not None:
        names = f": {told_names(facts.labels.names)}" if facts.labels.names else ""
        typer.echo(f"documents    texts with labels, {facts.labels.kind}{names}")
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
            + (f", {facts.left_out} more left out" if facts.left_out else "")
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
            labels = [] if dataset.manifest.labels is None else _labels(dataset, np.concatenate(rows))
            rows = [dataset.manifest.plain(row) for row in rows]
            texts = [rows[0]]
            if dataset.manifest.pairs:
                ends = rows[0] == tokenizer.eos_id
                texts = [part for part in np.split(rows[0], [int(ends.argmax()) + 1]) if len(part)]
            shown = "\n⟶ ".join([*(tokenizer.decode(text[:_SAMPLE_TOKENS]) for text in texts), *labels])
            more = " …" if any(len(text) > _SAMPLE_TOKENS for text in texts) or len(rows) > 1 else ""
            status_line.show(f"\n{source}: train document {number}, {length} tokens:\n{shown}{more}")


def _labels(dataset: "Dataset", stored: "np.ndarray") -> list[str]:
    """What is known of a text, in a line: labels of the first tokens, or of the text."""
    labels, vocab_size = dataset.manifest.labels, dataset.manifest.tokenizer.vocab_size
    assert labels is not None
    names = [*(labels.names or ("outside", "answer")), "none"]
    return [" ".join(names[token - vocab_size] for token in stored[stored >= vocab_size][:_SAMPLE_TOKENS].tolist())]
