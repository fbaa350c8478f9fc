"""`duet plan`: what a run needs and takes, before it is started."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ConfigError
from launch.completion import complete_configs
from model.gpus import GPUS, Gpu, find, near

if TYPE_CHECKING:
    from model.config.model_config import ModelConfig
    from pretrain.config.schema import Config
    from pretrain.planning.costs import RunCosts, Stage
    from pretrain.planning.goodput import Outlook

app = typer.Typer(no_args_is_help=True, help="Size and cost of a model.")
ConfigArgs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG… KEY=VALUE…",
        help="YAML files or presets, then overrides such as model.layers=4.",
        autocompletion=complete_configs,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def params(config: ConfigArgs, as_json: JsonOption = False) -> None:
    """Count the parameters: all, without the position table, and by part. Nothing is allocated.

    Examples: `duet model params model/published model.vocab_size=50257`,
    `duet model params model/tiny model.width=256 model.vocab_size=4096 --json`
    """
    from model.costs.totals import parameters_by_part

    parts = parameters_by_part(_model(config))
    total = sum(parts.values())
    totals = {"total": total, "without position table": total - parts.get("position table", 0)}
    _print(totals, parts, as_json)


@app.command()
def flops(config: ConfigArgs, as_json: JsonOption = False) -> None:
    """Floating-point operations for each token of a full context: forward, in training, and forward by part.

    Matrix products only; the token table is the head. Training is three times the forward pass, but for what has no
    backward pass. With model.block_gates there are two numbers more: what is executed without closed blocks, at the
    density that is configured.

    Examples: `duet model flops model/published model.vocab_size=50257`,
    `duet model flops model/decoder-125m model.vocab_size=50257 model.context=4096 --json`
    """
    from model.costs.flops import executed_flops_per_token, forward_flops_per_token, training_flops_per_token
    from model.costs.totals import gated_flops, sample_flops_by_part

    whole = _load(config)
    model, pairs = whole.model, whole.objective.of_pairs
    parts = {name: count / model.context for name, count in sample_flops_by_part(model, pairs).items()}
    totals = {"forward": forward_flops_per_token(model, pairs), "training": training_flops_per_token(model, pairs)}
    if gated_flops(model, pairs):
        totals["forward executed"] = executed_flops_per_token(model, pairs)
        totals["training executed"] = executed_flops_per_token(model, pairs, training=True)
    _print(totals, parts, as_json)


def _model(config: list[str]) -> "ModelConfig":
    return _load(config).model


def _load(config: list[str]) -> "Config":
    from pretrain.config.schema import load

    return _with_vocabulary(load(config))


def _print(totals: Mapping[str, float], parts: Mapping[str, float], as_json: bool) -> None:
    """A line for each number; of parts, their share of the sum, too."""
    if as_json:
        typer.echo(json.dumps({**{key.replace(" ", "_"): value for key, value in totals.items()}, "parts": parts}))
        return
    width = max(map(len, [*totals, *parts]))
    for name, count in totals.items():
        typer.echo(f"{name:<{width}} {count:>18,.0f}")
    for name, count in sorted(parts.items(), key=lambda part: -part[1]):
        typer.echo(f"{name:<{width}} {count:>18,.0f} {count / sum(parts.values()):7.2%}")


_GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
_OTHERS = "others by --tflops and --memory"
_SOME = ("a100", "h100", "l40s", "rtx4090")


def plan(
    config: ConfigArgs,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"What they are: a100, h100, rtx4090, … (docs/plan.md); {_OTHERS}."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Instead of --gpu: a GPU's dense bf16 peak, in 10^12 FLOP/s.")
    ] = None,
    memory: Annotated[int | None, typer.Option(min=1, help="With --tflops: a GPU's memory, in 10^9 bytes.")] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak that is expected; the journal has time/mfu.")
    ] = 0.4,
    interruption_hours: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Between interruptions of the run; if not given, as published for so many GPUs."),
    ] = None,
    time: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SECONDS", help="Measured: save, store, load, start, requeue, detect; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run needs and takes: memory of a GPU by ZeRO stage, time, checkpoints; and what fits if it does not.

    Interruptions, too: the share of the time that trains, what takes the rest, and the best train.checkpoint_every.

    Nothing is allocated and no GPU is needed (docs/plan.md). The vocabulary comes from the dataset, if it is built, or
    from model.vocab_size. Exit code 1: it does not fit.

    Example: `duet plan model/parallel-1b3 model.vocab_size=50304 batch.tokens=1048576 --gpus 64 --gpu h100`
    """
    from pretrain.planning.costs import costs
    from pretrain.planning.goodput import outlook, parse_times

    name, board = _board(gpu, tflops, memory)
    given = parse_times(time or [])
    loaded = _with_vocabulary(_with_origin(config))
    found = costs(loaded, gpus, board, mfu)
    ahead = outlook(loaded, found, gpus, interruption_hours, given)
    if as_json:
        typer.echo(json.dumps(_tree(found) | {"goodput": asdict(ahead)}))
    else:
        lines = _lines(loaded, found, gpus, name, board, mfu)
        table = lines.index("")
        typer.echo("\n".join([*lines[:table], *_goodput(loaded, ahead, found), *lines[table:]]))
    if not _fits(found, loaded):
        raise typer.Exit(1)


def _board(gpu: str | None, tflops: float | None, memory: int | None) -> tuple[str, Gpu]:
    """What the GPUs are called, and what they are.

    Raises:
        ConfigError: the options do not say, or name one that is not known.
    """
    if gpu is None:
        if tflops is None or memory is None:
            raise ConfigError(
                f"duet plan: name the GPU: --gpu NAME, such as {', '.join(_SOME)} (docs/plan.md lists {len(GPUS)}), or "
                "--tflops T --memory GB: its dense bf16 peak and its memory"
            )
        if not math.isfinite(tflops):
            raise ConfigError(f"--tflops {tflops}: expected a finite number, such as 989")
        return "GPU", Gpu("", memory, tflops * 1e12)
    if tflops is not None or memory is not None:
        raise ConfigError("--tflops and --memory are for a GPU that --gpu does not know; leave --gpu out")
    if board := find(gpu):
        return gpu.lower(), board
    known = near(gpu) or _SOME
    raise ConfigError(
        f"--gpu {gpu}: not known; near it: {', '.join(known)} ({len(GPUS)} in docs/plan.md); any other by --tflops T "
        "--memory GB: its dense bf16 peak and its memory"
    )


def _with_origin(args: list[str]) -> "Config":
    """The configuration, which has the values of what `run.start_from` names unless others are given, its model too.

    Raises:
        RunError: the weights of another model are to be trained.
    """
    from data_pipeline.places import EXPORT, RUN, kind_of
    from pretrain.config.layers import merged, read
    from pretrain.config.schema import load
    from pretrain.run import origin

    section = merged(read(args)).get("run")
    named = section.get("start_from") if isinstance(section, dict) else None
    if not isinstance(named, str):
        return load(args)
    path = origin.parse(named)[0]
    if kind_of(path) not in (EXPORT, RUN):
        why = "no run folder or export is there, so what is configured is planned"
        typer.echo(f"warning: run.start_from={named}: {why}", err=True)
        return load(args)
    found = load([str(origin.first_file(named)), *args])
    if found.finetune.kind != "none":
        origin.check_model(path, found)
    return found


def _with_vocabulary(config: "Config") -> "Config":
    from data_pipeline.places import DATASET, kind_of

    path = Path(config.data.path)
    if config.model.vocab_size is not None or kind_of(path) != DATASET:
        return config
    from dataclasses import dataclass

    from data_pipeline.storage.manifest import Manifest
    from pretrain.config.dataset_identity import complete

    @dataclass(frozen=True)
    class Built:
        path: Path
        manifest: Manifest

    return complete(config, Built(path, Manifest.load(path)))


def _fits(found: "RunCosts", config: "Config") -> bool:
    own = found.stages[config.engine.zero_stage].memory
    assert own is not None
    return own.total <= found.gpu_bytes


def _tree(found: "RunCosts") -> dict[str, object]:
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


def _lines(config: "Config", found: "RunCosts", gpus: int, name: str, board: Gpu, mfu: float) -> list[str]:
    from model.architectures.external import shown
    from pretrain.tracking.durations import duration

    engine, steps, checkpoints = config.engine, config.train.steps, found.checkpoints
    lines = [
        f"model       {shown(config.model.architecture)}, {found.parameters:,} parameters"
        + ("" if found.adapters is None else f", which stay; {found.adapters:,} of adapters are trained"),
        f"gpus        {gpus} x {name}: {board.memory_gb} GB, {board.peak_flops / 1e12:g} dense bf16 TFLOP/s",
        f"batch       {config.batch.tokens:,} tokens = {_readers(config, gpus)} x {found.accumulation} x "
        f"{found.micro_batch} sequences of {config.model.context}",
        f"step        {_flops(found)}, {found.step_seconds:.3g} s at MFU {mfu:g}{_far(config)}",
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
    if found.gates:
        lines.insert(4, f"gates       {found.gates}")
    if found.attention:
        lines.insert(4, f"attention   {found.attention}")
    if found.exchanged_bytes:
        text = f"{_gib(found.exchanged_bytes)} GiB from each rank to those that share its sequences, in a step"
        lines.insert(4, f"exchanged   {text}")
    if not _fits(found, config):
        lines += ["", "The run does not fit. What would:", *(f"  {change}" for change in found.fitting or _NOTHING)]
    return lines


def _readers(config: "Config", gpus: int) -> str:
    ranks = config.engine.sequence_parallel
    return f"{gpus} rank(s)" if ranks == 1 else f"{gpus // ranks} group(s) of {ranks} ranks"


def _goodput(config: "Config", ahead: "Outlook", found: "RunCosts") -> list[str]:
    from pretrain.tracking.durations import duration

    own, best, every = ahead.own, ahead.best, config.train.checkpoint_every
    worth = max(own.by_second.values())
    return [
        f"goodput     {own.share:.2%} of the time trains, with an interruption every {duration(ahead.hours * 3600)} "
        f"and a checkpoint every {duration(own.interval)} (train.checkpoint_every={every:,}): "
        f"{duration(found.run_seconds / own.share)} in all",
        f"            saving takes {own.saving:.2%}, steps taken again {own.lost:.2%}, being down {own.down:.2%}",
        f"best        {best.share:.2%}, with train.checkpoint_every={ahead.best_steps:,}: saving {best.saving:.2%}, "
        f"steps taken again {best.lost:.2%}, being down {best.down:.2%}",
        f"seconds     {', '.join(f'{name} {seconds:.3g}' for name, seconds in asdict(ahead.times).items())} (--time)",
        "a second    less of each is worth, at your interval: "
        + ", ".join(f"{name} {gain:.3%}" for name, gain in own.by_second.items() if gain > worth / 1e3),
    ]


def _far(config: "Config") -> str:
    if config.model.traits.in_turn:
        return f", which {config.model.context} tokens one after the other are far from (--mfu)"
    return ", a share of the bf16 peak, which fp32 is far from (--mfu)" if config.engine.precision == "fp32" else ""


def _flops(found: "RunCosts") -> str:
    executed, nominal = found.executed_flops_per_step, found.flops_per_step
    return f"{nominal:.3g} FLOPs" if executed == nominal else f"{executed:.3g} FLOPs of {nominal:.3g}"


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
