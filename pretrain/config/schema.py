"""The configuration of a run: typed, strict, stacked. Free of torch: login nodes read this.

Defaults < YAML files or presets, in the order given < dotted overrides (`optimizer.lr=3e-4`).
"""

from contextlib import suppress
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from data_pipeline.places import DATASET, RUN, mistaken
from data_pipeline.secret import WAY_ON, argument_of_secret, key_of_secret
from model.architectures import external
from model.architectures.registry import DEFAULT, SOURCES, AnyModelConfig, class_of, configure
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from pretrain.config import layers
from pretrain.config.explain import explain, origin
from pretrain.config.keys import Keys
from pretrain.config.sections import (
    BatchConfig,
    EngineConfig,
    FinetuneConfig,
    HealthConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from pretrain.objectives.objective import Objective
from pretrain.objectives.registry import OBJECTIVES, objective_of

ARCHITECTURE = "model.architecture"
EVAL_SHARE = 32
"""Tokens that are trained on for each that is validated on, unless `train.eval_tokens` is given."""


class Config(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """All of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: AnyModelConfig = configure({})
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _the_objective_fits_the_model(self) -> "Config":
        objective = self.objective
        if unknown := [name for name in self.model.traits.objectives if name not in OBJECTIVES]:
            name, known = external.shown(self.model.architecture), ", ".join(OBJECTIVES)
            raise ValueError(f"{name}: traits.objectives: no {', '.join(unknown)}; there are {known}")
        self.model.check_objective(objective.name)
        if objective.against_documents and self.model.document_mask:
            raise ValueError(
                f"data.objective={objective.name} {objective.against_documents}; leave model.document_mask out"
            )
        return self

    @model_validator(mode="after")
    def _packed_windows_suit_the_objective(self) -> "Config":
        data = self.data
        if data.packing == "best_fit" and not self.objective.takes_packed:
            raise ValueError(
                f"data.packing=best_fit fills a window with several documents and padding, and data.objective="
                f"{data.objective} takes a window as one text without gaps; take data.packing=plain"
            )
        if self.objective.of_conversations and data.packing != "best_fit":
            raise ValueError(
                f"data.objective={data.objective}: conversations are packed whole into windows; set "
                "data.packing=best_fit, with model.document_mask=true to keep them apart"
            )
        if data.mask_boundaries and not self.objective.takes_boundaries:
            raise ValueError(
                f"data.mask_boundaries is about the label after a document's end, which data.objective="
                f"{data.objective} has not; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_finetune(self) -> "Config":
        if self.finetune.kind != "none" and self.run.start_from is None:
            raise ValueError(
                f"finetune.kind={self.finetune.kind}: of which weights? name a run or an export: run.start_from, or "
                "duet train --from"
            )
        if self.finetune.kind == "lora" and self.optimizer.kind == "muon":
            raise ValueError("finetune.kind=lora trains with AdamW: set optimizer.kind=adamw")
        return self

    @model_validator(mode="after")
    def _batch_holds_whole_sequences(self) -> "Config":
        tokens, context = self.batch.tokens, self.model.context
        if tokens % context:
            raise ValueError(
                f"batch.tokens={tokens} is not a multiple of model.context={context}; "
                f"nearest: {_nearest_multiples(tokens, context)}"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_whole_steps(self) -> "Config":
        total, step = self.train.tokens, self.batch.tokens
        if total is None:
            return self
        if total % step:
            raise ValueError(
                f"train.tokens={total} is not a whole number of steps of batch.tokens={step}; "
                f"nearest: {_nearest_multiples(total, step)}"
            )
        # From here on there are steps only: what is written into a run folder says it once.
        object.__setattr__(self, "train", self.train.model_copy(update={"steps": total // step, "tokens": None}))
        return self

    @model_validator(mode="after")
    def _schedule_fits_the_steps(self) -> "Config":
        steps, schedule = self.train.steps, self.schedule
        if schedule.cooldown and schedule.warmup_steps + schedule.cooldown > steps:
            raise ValueError(
                f"schedule.warmup_steps={schedule.warmup_steps} and schedule.cooldown={schedule.cooldown} "
                f"do not fit into train.steps={steps}; the cool-down can be at most "
                f"{max(0, steps - schedule.warmup_steps)}"
            )
        return self

    @model_validator(mode="after")
    def _the_stage_can_do_it(self) -> "Config":
        engine = self.engine
        if engine.zero_stage == 0 and engine.precision != "fp32":
            lowest = 2 if self.optimizer.kind == "muon" else 1
            raise ValueError(
                f"DeepSpeed cannot accumulate {engine.precision} gradients in fp32 at zero_stage=0; "
                f"use engine.zero_stage={lowest}, or engine.precision=fp32"
            )
        if engine.zero_stage == 3 and self.model.why_not_partitioned:
            raise ValueError(f"engine.zero_stage=3: {self.model.why_not_partitioned}")
        if engine.hpz_partition_size > 1 and engine.zero_stage != 3:
            raise ValueError(
                f"engine.hpz_partition_size={engine.hpz_partition_size} divides the parameters of ZeRO 3; use "
                "engine.hpz_partition_size=1, or engine.zero_stage=3"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_an_engine(self) -> "Config":
        if self.optimizer.kind != "muon":
            return self
        engine = self.engine
        if engine.precision == "bf16" and engine.zero_stage == 1:
            raise ValueError(
                "optimizer.kind=muon: DeepSpeed's stage 1 for bf16 never makes the update orthogonal; "
                "use engine.zero_stage=2, or engine.precision=fp32"
            )
        if engine.precision == "fp16" or engine.offload != "none":
            raise ValueError("optimizer.kind=muon is for bf16 and fp32 without engine.offload")
        if self.optimizer.mask_lr is not None:
            raise ValueError(
                f"optimizer.mask_lr={self.optimizer.mask_lr}: optimizer.kind=muon moves the masks' matrices itself; "
                "use optimizer.mask_lr=null"
            )
        if self.optimizer.attention_lr is not None:
            raise ValueError(
                f"optimizer.attention_lr={self.optimizer.attention_lr}: DeepSpeed's Muon moves all but the matrices at "
                "optimizer.lr; use optimizer.attention_lr=null"
            )
        if self.optimizer.clip:
            raise ValueError(
                f"optimizer.clip={self.optimizer.clip}: at the stages 1 to 3 DeepSpeed would clip Muon's orthogonal "
                "update, not the gradient, and so divide optimizer.muon_lr by the update's norm; use optimizer.clip=0"
            )
        return self

    @model_validator(mode="after")
    def _masks_with_a_learning_rate_exist(self) -> "Config":
        if self.optimizer.mask_lr is not None and not self.model.dropout_sites:
            raise ValueError(
                f"optimizer.mask_lr={self.optimizer.mask_lr}, but there are no masks; use optimizer.mask_lr=null, or "
                "model.learned_dropout.enabled=true"
            )
        return self

    @model_validator(mode="after")
    def _attention_with_a_learning_rate_learns(self) -> "Config":
        model, rate = self.model, self.optimizer.attention_lr
        if rate is not None and not (isinstance(model, TransformerConfig) and model.weights.learned):
            raise ValueError(
                f"optimizer.attention_lr={rate}, but nothing that shapes attention's weights is learned; use "
                "optimizer.attention_lr=null, or model.weights.kind=entmax"
            )
        return self

    @model_validator(mode="after")
    def _layers_bear_what_the_engine_does(self) -> "Config":
        if self.engine.compile and self.model.why_not_compiled:
            raise ValueError(f"engine.compile: {self.model.why_not_compiled}")
        if self.model.norm == "batchnorm" and self.engine.activation_checkpointing:
            raise ValueError(
                "engine.activation_checkpointing computes each layer twice, and model.norm=batchnorm would let each "
                "micro-batch into its running statistics twice; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> "Config":
        if (ranks := self.engine.sequence_parallel) > 1:
            why_not = self.model.why_not_shared(ranks)
            if self.engine.compile:
                why_not = "exchanges between ranks in the middle of a layer were not tried with engine.compile"
            if why_not:
                raise ValueError(f"engine.sequence_parallel={ranks}: {why_not}")
        return self

    @model_validator(mode="after")
    def _profiled_steps_are_trained(self) -> "Config":
        if self.profile.steps and self.profile.steps[1] > self.train.steps:
            raise ValueError(f"profile.steps={list(self.profile.steps)} goes beyond train.steps={self.train.steps}")
        return self

    @model_validator(mode="after")
    def _health_fits_the_rest(self) -> "Config":
        health, timeout, keep = self.health, self.engine.timeout_minutes, self.train.keep_checkpoints
        if health.hang_minutes and health.hang_minutes >= timeout:
            raise ValueError(
                f"health.hang_minutes={health.hang_minutes:g} must be below engine.timeout_minutes={timeout:g}, "
                f"which ends the run; for example {timeout / 2:g}"
            )
        if health.on_spike == "rollback" and health.rollback_checkpoints > keep:
            raise ValueError(
                f"health.rollback_checkpoints={health.rollback_checkpoints}, but only train.keep_checkpoints={keep} "
                "stay on disk; raise the one or lower the other"
            )
        return self

    @property
    def objective(self) -> type[Objective]:
        """What is made of the text for the model to learn from."""
        return objective_of(self.data.objective)

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.batch.tokens // self.model.context

    @property
    def eval_windows(self) -> int | None:
        """Windows of a validation that is not the last one; None: all."""
        train = self.train
        if train.eval_tokens == "all":
            return None
        tokens = train.eval_tokens or train.eval_every * self.batch.tokens / EVAL_SHARE
        return ceil(tokens / self.model.context)

    @property
    def labels_vary(self) -> bool:
        """Whether micro-batches of a step may hold unequal numbers of labels, so that ranks have to add them up."""
        uneven = self.objective.labels_vary or self.data.packing == "best_fit"
        return uneven or self.data.mask_boundaries or self.model.document_mask

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.run.name}")

    @property
    def hang_minutes(self) -> float:
        """Minutes without progress after which a rank writes its stacks."""
        return self.health.hang_minutes or self.engine.timeout_minutes / 2

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(sequences of a micro-batch, micro-batches of a step) on each rank; with `engine.sequence_parallel` on each
        group of ranks that share sequences.

        Raises:
            ConfigError: the ranks or the micro-batch do not divide the global batch; names the nearest that do.
        """
        sequences, sharing = self.global_batch, self.engine.sequence_parallel
        if world_size % sharing:
            raise ConfigError(
                f"engine.sequence_parallel={sharing}: so many ranks share each sequence, and {world_size} rank(s) are "
                f"no whole number of such groups; nearest: {_nearest_multiples(world_size, sharing)} ranks"
            )
        groups = world_size // sharing
        if sequences % groups:
            near = _nearest_divisors(sequences, groups, times=sharing)
            raise ConfigError(
                f"batch.tokens={self.batch.tokens} is {sequences} sequences, which {world_size} ranks cannot share "
                f"evenly; numbers of ranks that can: {near}; batch.tokens that "
                f"{world_size} can: {_nearest_multiples(self.batch.tokens, groups * self.model.context)}"
            )
        share = sequences // groups
        micro = self.batch.micro_batch or share
        if share % micro:
            reader = "a rank has" if sharing == 1 else f"{sharing} ranks, which share them, have"
            raise ConfigError(
                f"batch.micro_batch={micro} does not divide the {share} sequences that {reader} of each step; "
                f"nearest that do: {_nearest_divisors(share, micro)}"
            )
        return micro, share // micro


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return " or ".join(str(multiple) for multiple in (below, below + of) if multiple)


def _nearest_divisors(number: int, near: int, times: int = 1) -> str:
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " or ".join(str(times * divisor) for divisor in below[-1:] + above[:1])


def load(args: list[str]) -> Config:
    """Stack the configurations that `args` names: YAML files, presets (`run/quickstart`), dotted overrides.

    The `config.yaml` of a run folder means that folder, wherever it was moved; with `run.name=…`, a new run like it.
    The source of an architecture that is not ours is run; its file's place is seen from the file that names it.

    Raises:
        ConfigError: a file that is not there or cannot be read, an unknown key, a value of the wrong kind.
    """
    if key := argument_of_secret(args, ()):  # before anything is parsed, and shown in an error
        raise ConfigError(f"command line: {key}: {WAY_ON}")
    stack = layers.read(args)
    merged = layers.merged(stack)
    if key := key_of_secret(merged):
        raise ConfigError(f"{origin(key.split('.'), stack)}: {key}: {WAY_ON}")
    _check_text(merged)
    sources = layers.sources(stack)
    keys = Keys(Config, _model_class(merged, sources))
    try:
        config = Config.model_validate(layers.spelt_out(merged, Config, keys), context={SOURCES: sources})
    except ValidationError as error:
        raise ConfigError("\n".join(explain(detail, stack, keys) for detail in error.errors())) from error
    if told := mistaken(Path(config.data.path), DATASET):
        raise ConfigError(f"{origin(['data', 'path'], stack)}: data.path={config.data.path}: {told}")
    in_the_way = "this is a file, and a folder is wanted" if layers.is_file(str(config.run_dir)) else None
    if told := in_the_way or mistaken(config.run_dir, RUN):
        raise ConfigError(f"{origin(['run', 'dir'], stack)}: run.dir={config.run_dir}: {told}")
    return config


def dump(config: Config) -> str:
    """The configuration as YAML, every value included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not (key == ARCHITECTURE and external.same(before.get(key), after.get(key)))
    }


def model_from(raw: Any) -> ModelConfig:
    """The configuration of a model that another file than a run's holds, as strictly as `load` takes one.

    Raises:
        ValueError: as `configure`.
    """
    tree = {"model": raw}
    return configure(layers.spelt_out(tree, Config, Keys(Config, _model_class(tree, None)))["model"])


def _model_class(merged: dict[str, Any], sources: list[Path] | None) -> type[ModelConfig]:
    """That of the architecture which is named; of the default one where it is not known, which validation says."""
    model = merged.get("model")
    named = str(model.get("architecture", DEFAULT)) if isinstance(model, dict) else DEFAULT
    with suppress(ValueError):
        return class_of(named, sources)[1]
    return class_of(DEFAULT)[1]


def _check_text(tree: Any) -> None:
    """Raises ConfigError for text that no file of a run could hold."""
    if isinstance(tree, dict | list):
        for node in (*tree, *tree.values()) if isinstance(tree, dict) else tree:
            _check_text(node)
    elif isinstance(tree, str):
        try:
            tree.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"configuration: {tree!a} is not UTF-8; name it otherwise") from None


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
