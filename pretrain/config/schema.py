"""The configuration of a run: typed, strict, stacked. Free of torch: login nodes read this.

Defaults < YAML files or presets, in the order given < dotted overrides (`optimizer.lr=3e-4`).
"""

import difflib
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError, model_validator

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from data_pipeline.secret import WAY_ON, argument_of_secret, key_of_secret
from duet_pretrain import SOURCE
from model.architectures import external
from model.architectures.registry import DEFAULT, SOURCES, AnyModelConfig, class_of, configure
from pretrain.config import yaml_files
from pretrain.config.sections import (
    BatchConfig,
    EngineConfig,
    HealthConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from pretrain.objectives.objective import Objective
from pretrain.objectives.registry import objective_of

ARCHITECTURE = "model.architecture"


class Config(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
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

    @model_validator(mode="after")
    def _the_objective_fits_the_model(self) -> "Config":
        objective = self.objective
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
        if data.mask_boundaries and not self.objective.takes_boundaries:
            raise ValueError(
                f"data.mask_boundaries is about the label after a document's end, which data.objective="
                f"{data.objective} has not; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _batch_holds_whole_sequences(self) -> "Config":
        tokens, context = self.batch.tokens, self.model.context
        if tokens % context:
            near = [n for n in (tokens // context * context, (tokens // context + 1) * context) if n]
            raise ValueError(
                f"batch.tokens={tokens} is not a multiple of model.context={context}; "
                f"nearest: {' or '.join(map(str, near))}"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_whole_steps(self) -> "Config":
        total, step = self.train.tokens, self.batch.tokens
        if total is None:
            return self
        if total % step:
            near = [n for n in (total // step * step, (total // step + 1) * step) if n]
            raise ValueError(
                f"train.tokens={total} is not a whole number of steps of batch.tokens={step}; "
                f"nearest: {' or '.join(map(str, near))}"
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
        """(sequences of a micro-batch, micro-batches of a step) on each rank.

        Raises:
            ConfigError: the ranks or the micro-batch do not divide the global batch; names the nearest that do.
        """
        sequences = self.global_batch
        if sequences % world_size:
            raise ConfigError(
                f"batch.tokens={self.batch.tokens} is {sequences} sequences, which {world_size} ranks cannot share "
                f"evenly; numbers of ranks that can: {_nearest_divisors(sequences, world_size)}"
            )
        share = sequences // world_size
        micro = self.batch.micro_batch or share
        if share % micro:
            raise ConfigError(
                f"batch.micro_batch={micro} does not divide the {share} sequences a rank has of each step; "
                f"nearest that do: {_nearest_divisors(share, micro)}"
            )
        return micro, share // micro


def _nearest_divisors(number: int, near: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return " or ".join(map(str, below[-1:] + above[:1]))


def load(args: list[str]) -> Config:
    """Stack the configurations that `args` names: YAML files, presets (`run/quickstart`), dotted overrides.

    The `config.yaml` of a run folder means that folder, wherever it was moved; with `run.name=…`, a new run like it.
    The source of an architecture that is not ours is run; its file's place is seen from the file that names it.

    Raises:
        ConfigError: a file that is not there or cannot be read, an unknown key, a value of the wrong kind.
    """
    if key := argument_of_secret(args, ()):  # before anything is parsed, and shown in an error
        raise ConfigError(f"command line: {key}: {WAY_ON}")
    stack: list[tuple[str, dict[str, Any]]] = []
    for arg in sorted(args, key=lambda a: "=" in a and not _is_file(a)):
        stack.append((arg, _placed(arg, _parse(arg))))
        if _is_file(arg) and Path(arg).with_name("run.json").is_file():
            named = any(other.startswith("run.name=") for other in args)
            stack.append((arg, {"run": {"dir": None if named else str(Path(arg).parent)}}))
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge({}, *(tree for _, tree in stack)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {error}") from error
    if key := key_of_secret(merged):
        raise ConfigError(f"{_origin(key.split('.'), stack)}: {key}: {WAY_ON}")
    _check_text(merged)
    try:
        return Config.model_validate(merged, context={SOURCES: _sources(stack)})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, stack) for detail in error.errors())) from error


def presets() -> list[str]:
    """Names of the shipped presets: `model/tiny`, `run/quickstart`, …; sites (`launch.slurm.site`) are none of them."""
    root = SOURCE / "configs"
    return sorted(
        f"{room.name}/{preset.name.removesuffix('.yaml')}"
        for room in root.iterdir()
        if room.is_dir() and room.name != "cluster"
        for preset in room.iterdir()
        if preset.name.endswith(".yaml")
    )


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


def _placed(arg: str, tree: dict[str, Any]) -> dict[str, Any]:
    """What `arg` says, with the place of an architecture's file as seen from there."""
    if _holds(tree, ["model", "architecture"]) and isinstance(named := tree["model"]["architecture"], str):
        tree["model"]["architecture"] = external.absolute(named, Path(arg).parent if _is_file(arg) else Path.cwd())
    return tree


def _sources(stack: list[tuple[str, dict[str, Any]]]) -> list[Path]:
    """Folders of runs that the files in the stack lie in: at the top, or in `slurm`."""
    files = [Path(name).absolute() for name, _ in stack if _is_file(name)]
    return list(dict.fromkeys(folder for file in files for folder in file.parents[:2]))


def _is_file(arg: str) -> bool:
    try:
        return Path(arg).is_file()
    except (OSError, ValueError):  # an override may be longer than a name can be
        return False


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


def _parse(arg: str) -> dict[str, Any]:
    path = Path(arg)
    try:
        if _is_file(arg):
            text = path.read_text(encoding="utf-8")
        elif "=" in arg:
            return OmegaConf.to_container(OmegaConf.from_dotlist([arg]))  # type: ignore[return-value]
        elif arg in presets():
            text = (SOURCE / "configs" / f"{arg}.yaml").read_text(encoding="utf-8")
        else:
            near = difflib.get_close_matches(arg, presets(), n=3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise ConfigError(f"{arg}: no such file or preset; {hint}presets: {', '.join(presets())}")
        tree = OmegaConf.to_container(OmegaConf.create(text)) if isinstance(yaml_files.parse(text), dict) else None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"{arg}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{arg}: expected keys and values, such as `train: {{steps: 100}}`")
    return {str(key): value for key, value in tree.items()}


def _explain(detail: Any, stack: list[tuple[str, dict[str, Any]]]) -> str:
    """One pydantic error in the user's terms: where it was set, what is wrong, what would be right."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    origin = _origin(location, stack)
    if detail["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1], stack)
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
        prefix = ".".join(location[:-1])
        hint = f"; nearest valid key: {'.'.join(filter(None, (prefix, near[0])))}" if near else ""
        return f"{origin}: unknown key {key}{hint}"
    message = detail["msg"].removeprefix("Value error, ")
    # Our own messages name what they want named: a value may be a password.
    show = detail["type"] != "value_error" and not isinstance(detail["input"], dict | BaseModel)
    given = f" (given: {detail['input']!r})" if show else ""
    return f"{origin}: {key + ': ' if key else ''}{message}{given}"


def _origin(location: list[str], stack: list[tuple[str, dict[str, Any]]]) -> str:
    """Where a key was set last."""
    origin = next((name for name, tree in reversed(stack) if _holds(tree, location)), "configuration")
    return "command line" if "=" in origin else origin  # which may hold a password


def _holds(tree: Any, location: list[str]) -> bool:
    for part in location:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return bool(location)


def _valid_keys(location: list[str], stack: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Keys at a dotted location; those of a model are of the architecture that was chosen last."""
    kind: Any = Config
    for part in location:
        if kind is Config and part == "model":
            chosen = [tree["model"]["architecture"] for _, tree in stack if _holds(tree, ["model", "architecture"])]
            kind = class_of(chosen[-1] if chosen else DEFAULT, _sources(stack))[1]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        else:
            kind = get_args(kind)[-1]
        if get_origin(kind) in (Union, UnionType):
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
