"""`duet checkpoint`: look at what a run has saved."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints.")
PathArg = Annotated[Path, typer.Argument(metavar="PATH", help="A run folder or one checkpoint.")]


@app.command("ls")
def ls(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """List the complete checkpoints of a run, newest first.

    Example: `duet checkpoint ls runs/quickstart`
    """
    for checkpoint in _opened(run):
        manifest = checkpoint.manifest
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        typer.echo(f"{checkpoint.path}  step {manifest.step}  {len(manifest.shards)} shard(s)  {size:.1f} MiB")


@app.command("inspect")
def inspect(path: PathArg) -> None:
    """Say what a checkpoint (of a run: the newest) holds.

    Example: `duet checkpoint inspect runs/quickstart`
    """
    checkpoint = _opened(path)[0]
    manifest = checkpoint.manifest
    typer.echo(f"{checkpoint.path}")
    typer.echo(f"step {manifest.step}, written by {manifest.world_size} rank(s) at ZeRO {manifest.zero_stage}")
    for key, value in manifest.state.items():
        typer.echo(f"{key}: {value}")
    for name, shape in manifest.shapes.items():
        typer.echo(f"{name:<60} {shape}")


@app.command("verify")
def verify(path: PathArg) -> None:
    """Compare every shard with its hash; of a run: in all its checkpoints. Exit code 2 when one is damaged.

    Example: `duet checkpoint verify runs/quickstart`
    """
    for checkpoint in _opened(path):
        checkpoint.verify()
        typer.echo(f"{checkpoint.path}: whole")


def _opened(path: Path):  # type: ignore[no-untyped-def]  # naming the type would import torch
    from data_pipeline.errors import CheckpointError
    from pretrain.checkpoint import Checkpoint, complete
    from pretrain.run import RunFolder

    if (path / "manifest.json").is_file():
        return [Checkpoint(path)]
    found = [Checkpoint(directory) for directory in complete(RunFolder(path).checkpoints)]
    if not found:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run folder with one")
    return found
