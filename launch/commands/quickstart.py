"""The main job on text that is already on the machine: collect, tokenize, train, validate, report."""

import json
from pathlib import Path

import typer


def run(folder: Path, ranks: int) -> int:
    """Do all steps below `folder`; each is skipped when it is done already.

    Returns:
        the exit code.
    """
    from data_pipeline.building.api import build
    from launch.commands.python_docs import collect
    from launch.local.local_ranks import run_ranks
    from launch.progress import progress_line
    from pretrain.config.schema import load

    corpus = folder / "data" / "python-docs.jsonl.zst"
    args = [
        "data/python-docs",
        "model/tiny",
        "run/quickstart",
        f"data.path={_quoted(folder / 'data' / 'python-docs')}",
        f"data.sources.python.paths=[{_quoted(corpus)}]",
        f"run.dir={_quoted(folder / 'runs' / 'quickstart')}",
    ]
    config = load(args)
    config.micro_batches(ranks)
    if not corpus.exists():
        typer.echo(f"1/3 collecting Python's own documentation into {corpus}")
        collect(corpus)
    typer.echo(f"2/3 tokenizer and shards in {config.data.path}")
    with progress_line() as progress:
        build(config.data, progress)
    typer.echo(f"3/3 training on {ranks} ranks: ZeRO {config.engine.zero_stage}, {config.train.steps} steps")
    return run_ranks(args, ranks, config.run_dir / "logs")


def _quoted(path: Path) -> str:
    """A path in an override, whatever is in its name."""
    return json.dumps(str(path), ensure_ascii=False)
