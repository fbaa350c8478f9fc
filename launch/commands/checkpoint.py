"""`duet checkpoint`: look at what a run has saved, and keep it in order."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.commands.runs import RunArg, aligned, run_argument

if TYPE_CHECKING:
    from pretrain.export.smaller.comparison import Shrunk

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, thin them out, export them.")
PathArg = Annotated[Path, run_argument(metavar="PATH", help="A run folder or one checkpoint.")]
RunAtArg = Annotated[str, run_argument(metavar="RUN[@STEP]", help="A run folder (its newest checkpoint), or one.")]
_SHARDS = ("SHARD", "MIB", "FRAGMENTS", "XXH3_128")
_PARAMETERS = ("PARAMETER", "SHAPE", "VALUES", "STATES")
_MOST_VALUE = 60
"""Characters of a value in the table."""


@app.command("ls")
def ls(run: RunArg) -> None:
    """List the complete checkpoints of a run, newest first: size, age, validation loss, and why each stays.

    Example: `duet checkpoint ls runs/quickstart`
    """
    from data_pipeline.errors import CheckpointError
    from pretrain.checkpoint.manifest import CheckpointManifest
    from pretrain.checkpoint.retention import reasons
    from pretrain.run.checkpoint_folder import complete, is_checkpoint
    from pretrain.run.run_folder import RunFolder

    folder = RunFolder(run)
    train = folder.config().train
    complete(folder.checkpoints, _warn)
    found = reasons(folder.checkpoints, train.keep_checkpoints, train.keep_every, folder.facts().get("id"))
    if not found:
        raise CheckpointError(f"{run}: no complete checkpoint yet")
    for path, why in found.items():
        try:
            manifest = CheckpointManifest.load(path)
        except CheckpointError as error:
            if is_checkpoint(path):
                typer.echo(f"{path}  DAMAGED: {error}")
            continue
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        age = f"{_age(time.time() - manifest.saved)} old" if manifest.saved else "age unknown"
        loss = "not validated" if manifest.validation_loss is None else f"validation {manifest.validation_loss:.4f}"
        typer.echo(f"{path}  step {manifest.step}  {size:.1f} MiB  {age}  {loss}  {', '.join(why) or 'may go'}")


@app.command("inspect")
def inspect(
    path: PathArg, as_json: Annotated[bool, typer.Option("--json", help="The whole manifest, as JSON.")] = False
) -> None:
    """Say what a checkpoint (of a run: the newest) holds.

    Example: `duet checkpoint inspect runs/quickstart`
    """
    from pretrain.checkpoint.manifest import CheckpointManifest
    from pretrain.run.checkpoint_folder import while_there

    folder, manifest = while_there(lambda: _newest(path), lambda found: (found, CheckpointManifest.load(found)))
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
        return
    facts = [
        ("step", str(manifest.step)),
        ("written by", f"{manifest.world_size} rank(s) at ZeRO {manifest.zero_stage}"),
        ("updates", str(manifest.optimizer_steps)),
        ("validation loss", str(manifest.validation_loss)),
        *((name, _short(value)) for name, value in _flat(manifest.state)),
    ]
    shards = [
        (shard.file, f"{shard.bytes / 2**20:,.1f}", str(len(shard.fragments)), shard.xxh3_128)
        for shard in manifest.shards
    ]
    parameters = [(name, shape, " ".join(manifest.states[name])) for name, shape in manifest.shapes.items()]
    parameters += [(name, shape, "buffer") for name, shape in manifest.buffers.items()]
    rows = [(name, " x ".join(map(str, shape)), f"{math.prod(shape):,}", states) for name, shape, states in parameters]
    typer.echo(str(folder))
    for table in (aligned([*facts]), aligned([_SHARDS, *shards]), aligned([_PARAMETERS, *rows])):
        typer.echo("\n" + "\n".join(table))


@app.command("verify")
def verify(path: PathArg) -> None:
    """Compare manifest and shards with their hashes; of a run: in all its checkpoints.

    Of one that holds adapters, the weights that they change, too.

    Exit code 2 when one is damaged, or of another run.

    Example: `duet checkpoint verify runs/quickstart`
    """
    from data_pipeline.errors import CheckpointError
    from pretrain.checkpoint.checkpoint import Checkpoint
    from pretrain.checkpoint.ownership import check_own
    from pretrain.finetune.base import verify_base
    from pretrain.run.checkpoint_folder import complete, is_checkpoint
    from pretrain.run.run_folder import RunFolder

    wrong: list[str] = []
    folder = None if is_checkpoint(path) else RunFolder(path)
    paths = complete(folder.checkpoints, _warn) if folder else [path]
    for found in paths:
        try:
            checkpoint = Checkpoint(found)
            if folder:
                check_own(checkpoint, folder)
            checkpoint.verify()
            verify_base(checkpoint)
            typer.echo(f"{found}: whole")
        except CheckpointError as error:
            if folder and not is_checkpoint(found):
                typer.echo(f"{found}: removed by its run meanwhile")
            else:
                wrong.append(str(error))
    if wrong:
        raise CheckpointError("\n".join(wrong))
    if not paths:
        raise CheckpointError(f"{path}: {_no_checkpoint(path)}")


@app.command("diff")
def diff(
    a: Annotated[Path, run_argument(metavar="A", help="A run folder (its newest checkpoint) or one checkpoint.")],
    b: Annotated[Path, run_argument(metavar="B", help="Another.")],
) -> None:
    """Say how two checkpoints differ: metadata, and of each parameter's states the largest and the relative change.

    Relative: norm of the difference over the norm in A. States that agree bit for bit are only counted. A buffer of the
    model, such as a running statistic, counts as a state.

    Example: `duet checkpoint diff runs/quickstart runs/quickstart/checkpoints/step-000000200`
    """
    from pretrain.checkpoint.checkpoint import whole
    from pretrain.checkpoint.differences import metadata_differences, shape_differences, tensor_differences
    from pretrain.run.checkpoint_folder import while_there

    one, other = while_there(lambda: _newest(a), whole), while_there(lambda: _newest(b), whole)
    for key, (left, right) in metadata_differences(one, other).items():
        typer.echo(f"{key}: {left} | {right}")
    for key, (left, right) in shape_differences(one, other).items():
        typer.echo(f"{key}: {left} | {right}")
    equal = 0
    for found in tensor_differences(one, other):
        if found.largest == 0:
            equal += 1
        else:
            typer.echo(f"{found.name:<50} {found.state:<12} max {found.largest:.3e}  relative {found.relative:.3e}")
    typer.echo(f"{equal} state(s) are equal")


@app.command("prune")
def prune(
    run: RunArg,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove all but the newest checkpoints of a run, those of `train.keep_every`, the best, and what adapters change.

    The newest one is compared with its hashes before anything goes.

    Example: `duet checkpoint prune runs/quickstart --keep 1 --dry-run`
    """
    from pretrain.checkpoint import retention
    from pretrain.checkpoint.checkpoint import whole
    from pretrain.checkpoint.ownership import check_own
    from pretrain.run.lease import await_unowned
    from pretrain.run.run_folder import RunFolder

    folder = RunFolder(run)
    every = folder.config().train.keep_every
    await_unowned(run)
    check_own(whole(_newest(run)), folder)
    for path in retention.prune(folder.checkpoints, keep, every, folder.facts().get("id"), dry_run=dry_run):
        typer.echo(f"{path}: {'would be removed' if dry_run else 'removed'}")


@app.command("export")
def export(
    path: RunAtArg,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder: weights in one safetensors file, tokenizer.")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights in --to.")] = "fp32",
    layout: Annotated[
        Literal["llama", "gpt2"] | None,
        typer.Option(help="Of --to: one that other programs know, of a decoder_only model that fits it."),
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder, in DeepSpeed's own layout.")
    ] = None,
) -> None:
    """Export a checkpoint: for `duet generate`, plain torch and Hugging Face, or as DeepSpeed would have saved it.

    In bf16 it says size, validation loss and speed here, before and after, as `duet checkpoint shrink` does.

    Example: `duet checkpoint export runs/quickstart --to exported`
    """
    from data_pipeline.errors import ConfigError
    from pretrain.inference.trained import find_checkpoint
    from pretrain.run.origin import parse

    if (to is None) == (deepspeed is None):
        raise ConfigError("name one new folder: --to FOLDER, or --deepspeed FOLDER for DeepSpeed's own layout")
    if deepspeed and (dtype != "fp32" or layout):
        raise ConfigError("--dtype and --layout are for --to; --deepspeed saves in the run's precision")
    checkpoint, config = find_checkpoint(*parse(path))
    if to and dtype == "bf16":
        from pretrain.export.smaller.weights import round_weights

        typer.echo("\n".join(_told(round_weights(checkpoint, config, to, dtype, layout))))
    elif to and layout:
        from pretrain.export.standard import write_standard

        write_standard(checkpoint, config, to, layout)
    elif to:
        from pretrain.export.portable import write_export

        write_export(checkpoint, config, to)
    if deepspeed:
        from pretrain.export.deepspeed_export import export_deepspeed

        export_deepspeed(checkpoint, deepspeed)
    typer.echo(f"{checkpoint.path}: exported to {to or deepspeed}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Llama or GPT-2 model, as transformers saves it.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder: an export, as Duet writes them.")],
) -> None:
    """Take a model from elsewhere, weights and tokenizer, to begin a run with: `duet train --from`.

    What does not fit is refused by the first field of its config.json that does not.

    Example: `duet checkpoint import SmolLM-135M --to begin`
    """
    from pretrain.export.standard import import_model

    found = import_model(folder, to)
    typer.echo(f"{folder}: imported to {to}: {found.layers} layers, width {found.width}, {found.vocab_size} tokens")


@app.command("shrink")
def shrink(
    path: RunAtArg,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder: an export of the smaller model.")
    ] = None,
    gates: Annotated[
        bool, typer.Option("--gates", help="Without blocks and channels that no held-out token opens.")
    ] = False,
    heads: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="Without so many heads of each attention, or such a share.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="Without so many hidden units of each feed forward.")
    ] = None,
    spans: Annotated[bool, typer.Option("--spans", help="Windows as wide as the learned spans reach.")] = False,
    dtype: Annotated[
        Literal["bf16", "int8"] | None, typer.Option(help="Weights of fewer bits: all, or those of linear maps.")
    ] = None,
    magnitude: Annotated[
        bool, typer.Option("--magnitude", help="Only say the loss with zeros for the smallest weights; no --to.")
    ] = False,
) -> None:
    """Export a smaller model; says size, validation loss and speed here, before and after.

    Heads and hidden units that go are those that add the least to the stream, measured on the held-out text.

    Examples: `duet checkpoint shrink runs/gated --gates --to smaller`,
    `duet checkpoint shrink runs/first --heads 1 --units 0.25 --to smaller`
    """
    from data_pipeline.errors import ConfigError
    from pretrain.run.origin import parse

    if sum([gates, spans, bool(heads or units), bool(dtype), magnitude]) != 1:
        raise ConfigError(
            "say what goes: --gates, blocks and channels that no held-out token opens; --heads and --units, those that "
            "add the least; --spans, what lies beyond the learned spans of attention; --dtype, bits of the weights; or "
            "--magnitude, which only tells"
        )
    if magnitude:
        from pretrain.export.smaller.magnitude import losses_with_zeros

        if to:
            raise ConfigError("--magnitude writes nothing, since products take as long with zeros; leave --to out")
        for zeros, loss in losses_with_zeros(*parse(path)):
            typer.echo(f"weights of linear maps that are zero: {zeros:<5} validation loss: {loss:.6f}")
        return
    if to is None:
        raise ConfigError("name a new folder for what is left: --to FOLDER")
    found = _made_smaller(path, to, gates, spans, dtype, (heads, units))
    typer.echo("\n".join([*_told(found), f"exported to {to}"]))


def _made_smaller(
    path: str,
    to: Path,
    gates: bool,
    spans: bool,
    dtype: Literal["bf16", "int8"] | None,
    fewer: tuple[str | None, str | None],
) -> "Shrunk":
    """By the one way that is asked for; `fewer` are heads and hidden units."""
    from pretrain.run.origin import parse

    if spans:
        from pretrain.export.smaller.windows import take_windows

        return take_windows(*parse(path), to)
    if gates:
        from pretrain.export.smaller.gates import remove_closed

        return remove_closed(*parse(path), to)
    if dtype:
        from pretrain.export.smaller.weights import round_weights
        from pretrain.inference.trained import find_checkpoint

        return round_weights(*find_checkpoint(*parse(path)), to, dtype)
    from pretrain.export.smaller.units import remove_units

    return remove_units(*parse(path), to, *fewer)


def _told(found: "Shrunk") -> list[str]:
    before, after = found.before, found.after
    lines = [
        *found.changes,
        f"parameters: {before.parameters:,} before, {after.parameters:,} after",
        f"weights: {before.size / 2**20:,.2f} MiB before, {after.size / 2**20:,.2f} after",
        f"validation loss: {before.loss:.6f} before, {after.loss:.6f} after",
        f"tokens a second here, read: {before.read:,.0f} before, {after.read:,.0f} after",
    ]
    if before.written and after.written:
        lines.append(f"tokens a second here, written: {before.written:,.0f} before, {after.written:,.0f} after")
    return lines


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An export.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME/MODEL, made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it for yourself only, if it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Upload an export to huggingface.co, or to the server that HF_ENDPOINT names.

    `hf auth login`, or HF_TOKEN, says who you are.

    Example: `duet push exported NAME/MODEL --dry-run`
    """
    from pretrain.export.hugging_face.push import check_name, is_licensed, uploads
    from pretrain.export.hugging_face.push import push as upload

    files = uploads(folder)
    check_name(repo)
    if not is_licensed(folder):
        typer.echo(
            f"warning: {folder / 'README.md'} does not say under which licence the weights may be used", err=True
        )
    if not dry_run:
        typer.echo(upload(folder, repo, private=private))
        return
    for file in files:
        typer.echo(f"{file.bytes:>15,}  {file.name}")
    typer.echo(f"{len(files)} files, {sum(file.bytes for file in files):,} bytes would go to {repo}")


def _no_checkpoint(path: Path) -> str:
    from data_pipeline.places import RUN, kind_of, mistaken

    told = mistaken(path, "checkpoint or run folder") if kind_of(path) != RUN else None
    return told or "neither a checkpoint nor a run folder with one"


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, in order."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_VALUE else f"{text[:_MOST_VALUE]}…"


def _newest(path: Path) -> Path:
    """A checkpoint's folder as it is, or the newest of a run."""
    from data_pipeline.errors import CheckpointError
    from pretrain.run.checkpoint_folder import complete, is_checkpoint
    from pretrain.run.run_folder import RunFolder

    if is_checkpoint(path):
        return path
    found = complete(RunFolder(path).checkpoints, _warn)
    if not found:
        raise CheckpointError(f"{path}: {_no_checkpoint(path)}")
    return found[0]
