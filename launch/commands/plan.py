"""`duet plan`: what a run needs and takes, before it is started."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.model import ConfigArgs, JsonOption
from model.gpus import GPUS

if TYPE_CHECKING:
    from pretrain.config.schema import Config
    from pretrain.planning.costs import Costs, Stage

_GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
GpuName = Enum("GpuName", {name: name for name in GPUS})  # type: ignore[misc]


def plan(
    config: ConfigArgs,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together.")],
    gpu: Annotated[GpuName, typer.Option(help="What they are.")],
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak that is expected; the journal has time/mfu.")
    ] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Say what a run needs and takes: memory of a GPU by ZeRO stage, time, checkpoints; and what fits if it does not.

    Nothing is allocated and no GPU is needed (docs/plan.md). The vocabulary comes from the dataset, if it is built, or
    from model.vocab_size. Exit code 1: it does not fit.

    Example: `duet plan model/parallel-1b3 model.vocab_size=50304 batch.tokens=1048576 --gpus 64 --gpu h100`
    """
    from pretrain.config.schema import load
    from pretrain.planning.costs import costs

    loaded = _with_vocabulary(load(config))
    board = GPUS[gpu.value]
    found = costs(loaded, gpus, board, mfu)
    if as_json:
        typer.echo(json.dumps(_tree(found)))
    else:
        typer.echo("\n".join(_lines(loaded, found, gpus, gpu.value, mfu)))
    if not _fits(found, loaded):
        raise typer.Exit(1)


def _with_vocabulary(config: "Config") -> "Config":
    from dataclasses import dataclass

    from data_pipeline.storage.manifest import MANIFEST, Manifest
    from pretrain.config.dataset_identity import complete

    @dataclass(frozen=True)
    class Built:
        path: Path
        manifest: Manifest

    path = Path(config.data.path)
    if config.model.vocab_size is not None or not (path / MANIFEST).is_file():
        return config
    return complete(config, Built(path, Manifest.load(path)))


def _fits(found: "Costs", config: "Config") -> bool:
    own = found.stages[config.engine.zero_stage].memory
    assert own is not None
    return own.total <= found.gpu_bytes


def _tree(found: "Costs") -> dict[str, object]:
    tree = asdict(found)
    tree["stages"] = {
        str(number): {
            "refused": stage.refused,
            "memory": stage.memory and {**asdict(stage.memory), "total": stage.memory.total},
            "fits": stage.memory is not None and stage.memory.total <= found.gpu_bytes,
            "largest_micro_batch": stage.largest_micro_batch,
        }
        for number, stage in found.stages.items()
    }
    return tree


def _lines(config: "Config", found: "Costs", gpus: int, gpu: str, mfu: float) -> list[str]:
    from pretrain.tracking.console import duration

    board, engine, steps = GPUS[gpu], config.engine, config.train.steps
    checkpoints = found.checkpoints
    lines = [
        f"model       {config.model.architecture}, {found.parameters:,} parameters",
        f"gpus        {gpus} x {gpu}: {board.memory_gb} GB, {board.peak_flops / 1e12:g} dense bf16 TFLOP/s",
        f"batch       {config.batch.tokens:,} tokens = {gpus} rank(s) x {found.accumulation} x {found.micro_batch} "
        f"sequences of {config.model.context}",
        f"step        {found.flops_per_step:.3g} FLOPs, {found.step_seconds:.3g} s at MFU {mfu:g}",
        f"speed       {found.tokens_per_second:,.0f} tokens/s",
        f"run         {steps:,} steps, {steps * config.batch.tokens:,} tokens: {duration(found.run_seconds)}, "
        f"{found.run_seconds * gpus / 3600:,.1f} GPU hours",
        f"checkpoint  {_gib(found.checkpoint_bytes)} GiB; at most {checkpoints} stay, "
        f"{_gib(checkpoints * found.checkpoint_bytes)} GiB",
        "",
        f"GiB of a GPU in {engine.precision}, micro-batches of {found.micro_batch}, at the fullest moment of a step "
        f"(* the run's own stage); a GPU has {_gib(found.gpu_bytes)}",
        f"  ZeRO {''.join(f'{part:>12}' for part in _PARTS)}       total  largest micro-batch, fullest moment",
    ]
    lines += [_row(number, stage, own=number == engine.zero_stage) for number, stage in found.stages.items()]
    if not _fits(found, config):
        lines += ["", "The run does not fit. What would:", *(f"  {change}" for change in found.fitting or _NOTHING)]
    return lines


_NOTHING = ("a smaller model only",)


def _row(number: int, stage: "Stage", own: bool) -> str:
    start = f"{'*' if own else ' '} {number:<5}"
    if stage.memory is None:
        return f"{start}{stage.refused}"
    needed = stage.memory
    parts = "".join(f"{_gib(getattr(needed, part)):>12}" for part in _PARTS)
    return f"{start}{parts}{_gib(needed.total):>12}  {stage.largest_micro_batch or 'none'}, {needed.moment}"


def _gib(size: float) -> str:
    return f"{size / _GIB:,.2f}" if size < 10 * _GIB else f"{size / _GIB:,.1f}"
