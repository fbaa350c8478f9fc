"""What a run costs before it starts: memory by ZeRO stage, time, checkpoints (docs/plan.md). Free of torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.costs.flops import (
    executed_flops_per_token,
    forward_flops_per_token,
    training_flops_per_token,
    trains_open_blocks,
)
from model.costs.totals import forward_only_flops, mixed_channels, num_parameters
from model.gpus import Gpu
from model.layers.block_sizes import pays
from pretrain.config.schema import Config
from pretrain.planning.adapters import adapters_of
from pretrain.planning.memory import Memory, element_size, memory

_MORE_GPUS = (2, 4, 8, 16, 32)


class Stage(NamedTuple):
    """A ZeRO stage, with all else as configured."""

    refused: str | None
    """Why the configuration cannot have it."""
    memory: Memory | None
    """At the configured micro-batch."""
    largest_micro_batch: int | None
    """Sequences that fit and divide a rank's share of the batch; None: not even one does."""


@dataclass(frozen=True)
class RunCosts:
    """Of a run; bytes, seconds and FLOPs."""

    parameters: int
    adapters: int | None
    """Parameters that are trained beside them, where these stay."""
    micro_batch: int
    accumulation: int
    stages: dict[int, Stage]
    gpu_bytes: float
    flops_per_step: float
    executed_flops_per_step: float
    """Without those of closed blocks, where training leaves them out and gains by it."""
    gates: str
    """What is to be said of block gates; empty where there are none."""
    attention: str
    """The same of attention with other weights or scores than a softmax of q k^T."""
    exchanged_bytes: float
    """That each rank sends in a step to those that share its sequences, and gets from them."""
    step_seconds: float
    tokens_per_second: float
    run_seconds: float
    checkpoint_bytes: float
    checkpoints: int
    """On disk at the end of the run, with the one of the lowest validation loss; one more while one is written."""
    fitting: list[str]
    """Where the configuration itself does not fit: changes with which it does, nearest first."""


def costs(config: Config, gpus: int, gpu: Gpu, utilisation: float) -> RunCosts:
    """Count for a number of GPUs.

    Args:
        utilisation: share of the GPUs' peak that the model's own FLOPs reach ("MFU", PaLM, arXiv:2204.02311, section
            4.1); activation checkpointing computes a third more, which does not count.

    Raises:
        ConfigError: the vocabulary is not known, or the GPUs cannot share the batch.
    """
    size = gpu.memory_gb * 1e9
    micro_batch, accumulation = config.micro_batches(gpus)
    stages = {stage: _stage(config, stage, gpus, size) for stage in range(4)}
    own = stages[config.engine.zero_stage].memory
    assert own is not None
    flops = _flops(config)
    gates, executed = _gates(config, micro_batch, flops)
    seconds = executed / (gpu.peak_flops * utilisation * gpus)
    parameters = num_parameters(config.model)
    return RunCosts(
        parameters=parameters,
        adapters=trained.parameters if (trained := adapters_of(config)) else None,
        micro_batch=micro_batch,
        accumulation=accumulation,
        stages=stages,
        gpu_bytes=size,
        flops_per_step=flops,
        executed_flops_per_step=executed,
        gates=gates,
        attention=_attention(config.model),
        exchanged_bytes=_exchanged(config, gpus),
        step_seconds=seconds,
        tokens_per_second=config.batch.tokens / seconds,
        run_seconds=seconds * config.train.steps,
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoints=_checkpoints(config),
        fitting=_fitting(config, gpus, size) if own.total > size else [],
    )


def _flops(config: Config) -> float:
    """Of a step. Weights that stay beside adapters have no gradients: a third less, but for the adapters' own.

    That third has the scores of attention in it, whose gradients are computed all the same, so it is a little too few.
    """
    model, pairs = config.model, config.objective.of_pairs
    per_token = training_flops_per_token(model, pairs)
    if adapters := adapters_of(config):
        passes = model.depth / model.layers
        per_token -= forward_flops_per_token(model, pairs) - forward_only_flops(model, pairs) / model.context
        per_token += passes * 6 * adapters.parameters
    return per_token * config.batch.tokens


def _gates(config: Config, micro_batch: int, flops: float) -> tuple[str, float]:
    """What block gates do to a step on GPUs, in words, and the FLOPs that it executes."""
    model = config.model
    if not isinstance(model, TransformerConfig) or not model.gate_sites:
        return "", flops
    tokens, gates = micro_batch * model.context // config.engine.sequence_parallel, model.block_gates
    shape = f"{gates.blocks} blocks of {model.block_width} hidden units, {gates.density:g} of them open"
    alone = pays(1, model.width, model.block_width)
    decoding = "" if alone else "; on a CPU they are too small to decode by: take fewer blocks or a larger model"
    after, steps = gates.train_sparse_after if gates.kind == "cosine" else 0, config.train.steps
    if after is None or after >= steps:
        why = "not set" if after is None else f"{after:,}, and train.steps={steps:,}"
        return f"{shape}; training computes all: model.block_gates.train_sparse_after is {why}{decoding}", flops
    if not trains_open_blocks(model, tokens, compiled=config.engine.compile, cuda=True):
        reason = (
            "engine.compile takes fixed shapes"
            if config.engine.compile
            else f"too small to gain by it in micro-batches of {tokens:,} tokens"
        )
        return f"{shape}; training computes all, {reason}{decoding}", flops
    pairs = config.objective.of_pairs
    share = executed_flops_per_token(model, pairs, training=True) / training_flops_per_token(model, pairs)
    executed = share * flops
    since = f" after step {after:,}" if after else ""
    return f"{shape}; training computes these alone{since}{decoding}", (
        after * flops + (steps - after) * executed
    ) / steps


def _exchanged(config: Config, gpus: int) -> float:
    """All that attention takes and gives, but for a rank's own share; its gradients; and what is computed again."""
    ranks = config.engine.sequence_parallel
    if ranks == 1:
        return 0.0
    ways = 2 + config.engine.activation_checkpointing
    size = mixed_channels(config.model) * element_size(config) * config.batch.tokens / gpus
    return ways * size * (ranks - 1) / ranks


def _attention(model: ModelConfig) -> str:
    """What other weights or scores do to memory and time, where FLOPs do not tell."""
    if not isinstance(model, TransformerConfig):
        return ""
    weights, scores = model.weights.kind, model.scores.kind
    formed = f"{model.heads} heads x {model.context:,} x {model.context:,} weights in each layer, which no kernel forms"
    if weights == "entmax":
        return f"entmax: {formed}; a dozen passes over them are in no FLOPs"
    if weights == "adaptive_span":
        return f"adaptive_span: {formed}; FLOPs are those of whole texts, spans learn to be shorter"
    if scores == "linformer":
        return f"linformer: {model.scores.slots:,} slots in the place of {model.context:,} keys"
    if scores == "routing" and model.scores.sorts(model.context, model.context, model.context):
        return f"routing: {model.context:,} tokens by cluster, each sees {model.scores.cluster_window:,} of its own"
    if scores == "routing":
        return f"routing: {formed}; clusters are a mask over them and save nothing"
    return f"synthesizer: {formed}" if scores == "synthesizer" else ""


def largest_micro_batch(config: Config, gpus: int, size: float) -> int | None:
    """Sequences of the largest micro-batch that fits into `size` bytes and divides a rank's share of the batch."""
    _, share = changed(config, {"batch.micro_batch": 1}).micro_batches(gpus)
    divisors = (n for n in range(share, 0, -1) if share % n == 0)
    fitting = (n for n in divisors if memory(changed(config, {"batch.micro_batch": n}), gpus).total <= size)
    return next(fitting, None)


def checkpoint_bytes(config: Config) -> float:
    """For each parameter 4 bytes of weight and 8 of moments, which are in fp32 also where AdamW keeps them in 8 bits.

    Muon keeps of matrices one moment, in bf16 or fp32; norms and biases, which have two, are counted as matrices.
    Where adapters are trained, they alone are saved.
    """
    model, parameters, adapters = config.model, num_parameters(config.model), adapters_of(config)
    if adapters:
        return (8.0 if config.optimizer.kind == "muon" else 12.0) * adapters.parameters
    if config.optimizer.kind != "muon":
        return 12.0 * parameters
    assert model.vocab_size is not None
    tables = (model.vocab_size + (model.context if model.positions == "learned" else 0)) * model.width
    momentum = 2 if config.engine.precision == "bf16" else 4
    return 12.0 * tables + (4 + momentum) * (parameters - tables)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values of dotted keys, checked as a whole.

    Raises:
        ConfigError: these values do not go together.
    """
    tree = config.model_dump() | {"model": config.model}
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def _fitting(config: Config, gpus: int, size: float) -> list[str]:
    found, more = [*fitting(config, gpus, size)], more_gpus(config, gpus, size)
    found = found or [*_sharing(config, gpus, size)]
    return found + ([f"--gpus {more[0] * gpus} batch.micro_batch={more[1]}"] if more else [])


def _stage(config: Config, stage: int, gpus: int, size: float) -> Stage:
    try:
        other = changed(config, {"engine.zero_stage": stage})
    except ConfigError as error:
        return Stage(str(error), None, None)
    return Stage(None, memory(other, gpus), largest_micro_batch(other, gpus, size))


def fitting(config: Config, gpus: int, size: float) -> Iterator[str]:
    """Changes that the configuration allows, and with which it fits into `size` bytes of each GPU, nearest first.

    Some need a smaller micro-batch, which is named beside them.
    """
    engine = config.engine
    single: list[dict[str, Any]] = [{}]
    single += [{"engine.activation_checkpointing": True}] if not engine.activation_checkpointing else []
    single += [{"engine.zero_stage": stage} for stage in range(engine.zero_stage + 1, 4)]
    single += [{"engine.zero_stage": 3, "engine.activation_checkpointing": True}]
    single += [{"engine.offload": "cpu"}] if engine.zero_stage and engine.offload == "none" else []
    for changes in single:
        try:
            other = changed(config, changes)
        except ConfigError:
            continue
        named = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
        if memory(other, gpus).total <= size:
            yield named
        elif micro_batch := largest_micro_batch(other, gpus, size):
            yield f"{named} batch.micro_batch={micro_batch}".strip()


def _sharing(config: Config, gpus: int, size: float) -> Iterator[str]:
    """The fewest ranks that have to share each sequence for one to fit, where nothing else helps."""
    for ranks in (2, 4, 8):
        changes = {"engine.sequence_parallel": ranks, "engine.zero_stage": 3, "engine.activation_checkpointing": True}
        try:
            micro_batch = largest_micro_batch(changed(config, changes), gpus, size)
        except ConfigError:
            continue
        if micro_batch:
            named = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            yield f"{named} batch.micro_batch={micro_batch}"
            return


def more_gpus(config: Config, gpus: int, size: float) -> tuple[int, int] | None:
    """How many times as many GPUs hold it, and the largest micro-batch there."""
    for factor in _MORE_GPUS:
        shared = config.global_batch % (factor * gpus) == 0
        if shared and (micro_batch := largest_micro_batch(config, factor * gpus, size)):
            return factor, micro_batch
    return None


def _checkpoints(config: Config) -> int:
    """Those that stay at the end (pretrain/checkpoint/retention.py), the best counted as none of the others."""
    every, steps, keep_every = config.train.checkpoint_every, config.train.steps, config.train.keep_every
    regular = steps // every
    saved = regular + len({step for step in (1, steps) if step % every})
    newest = {steps, *range(max(1, regular - config.train.keep_checkpoints) * every, steps, every), 1}
    kept = set(sorted(newest)[-config.train.keep_checkpoints :])
    milestones = 0
    if keep_every:
        both = lcm(every, keep_every)
        milestones = steps // both + len({step for step in (1, steps) if step % keep_every == 0 and step % both})
        milestones -= sum(1 for step in kept if step % keep_every == 0)
    return min(len(kept) + milestones + 1, saved)
