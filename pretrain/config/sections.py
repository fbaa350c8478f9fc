"""The sections of a run's configuration but for `data` and `model`, whose rooms own them. Free of torch."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator, model_validator

from data_pipeline import may_change
from data_pipeline.secret import WAY_ON, has_secret

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(
    BaseModel,
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
):
    """Identity of a run."""

    name: Annotated[str, may_change.IN_FORK] = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the folder and the MLflow run."""
    dir: Annotated[str | None, may_change.PLACE] = None
    """The run folder; `runs/<name>` unless given."""
    seed: int = Field(default=1337, ge=0, lt=2**63)
    """Seeds the weights, the data order and the noise."""
    start_from: Annotated[str | None, may_change.IN_FORK] = None
    """`RUN@STEP`: begin with that checkpoint of another run; its newest if only `RUN` (`duet train --from`). With
    `finetune.kind` begin with its weights only, or with those of an export."""

    @field_validator("dir")
    @classmethod
    def _a_folder_that_can_be_told(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():  # job scripts and logs have it in a line
            raise ValueError(f"{value!a} holds a character that cannot be printed; name another folder")
        if value is not None and value.startswith("~"):
            raise ValueError(f"{value}: a shell does not expand ~ here, and the folder would be called so; use $HOME")
        return value


class BatchConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The global batch of one optimizer step."""

    tokens: int = Field(default=8192, ge=1, le=2**32)
    """Tokens of a step over all ranks: a multiple of `model.context`."""
    micro_batch: Annotated[int | None, may_change.COMPUTED] = Field(default=None, ge=1)
    """Sequences a rank holds at once; the rank's whole share of the batch unless given."""


class OptimizerConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """AdamW, in 32 or 8 bits, or Muon with it. Weight decay acts on tensors of two and more dimensions only."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`adamw8bit` keeps AdamW's moments in 8 bits, in a quarter of the memory; `muon` moves the matrices of the layers
    by Muon; tables, norms and vectors stay with AdamW."""
    lr: Annotated[float, may_change.IN_FORK] = Field(default=9e-4, gt=0.0, le=1e30)
    """Peak learning rate of AdamW."""
    mask_lr: Annotated[float | None, may_change.IN_FORK] = Field(default=None, gt=0.0, le=1e30)
    """The most that the peak learning rate of what learned dropout computes its masks from may be: theirs is the lower
    of this and `lr`, and follows the same schedule. Not with Muon."""
    attention_lr: Annotated[float | None, may_change.IN_FORK] = Field(default=None, gt=0.0, le=1e30)
    """Peak learning rate of the few numbers that shape the weights of attention, such as alphas and
    spans (`model.weights`); ten times `lr` unless given. Not with Muon, where it is `lr`."""
    muon_lr: Annotated[float, may_change.IN_FORK] = Field(default=0.02, gt=0.0, le=1e30)
    """Peak learning rate of Muon; follows the same schedule."""
    muon_momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of Muon's running mean of the gradient (Nesterov's)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled: the weights shrink by lr × weight_decay a step."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off."""


class ScheduleConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Learning rate over the steps: linear warm-up to the peak `optimizer.lr`, then the kind's curve."""

    kind: Annotated[Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"], may_change.IN_FORK] = "cosine"
    """`cosine` and `linear` fall to `final_lr` at the last step, `wsd` does in its last `cooldown` steps only;
    `inverse_sqrt` falls as 1/sqrt(step), `constant` stays."""
    warmup_steps: Annotated[int, may_change.IN_FORK] = Field(default=100, ge=0)
    """Steps of linear rise from 0 to the peak."""
    cooldown: Annotated[int, may_change.IN_FORK] = Field(default=0, ge=0)
    """Last steps of the run, in which `wsd` falls to `final_lr`."""
    cooldown_shape: Annotated[Literal["1-sqrt", "linear"], may_change.IN_FORK] = "1-sqrt"
    """How `wsd` falls: by 1 - sqrt(share of the cool-down that is done), or in a line."""
    final_lr: Annotated[float, may_change.IN_FORK] = Field(default=0.0, ge=0.0)
    """Learning rate at the last step of `cosine`, `linear` and a `wsd` with a cool-down."""

    @model_validator(mode="after")
    def _only_wsd_cools_down(self) -> "ScheduleConfig":
        if self.cooldown and self.kind != "wsd":
            raise ValueError(f"cooldown={self.cooldown} is for kind=wsd; {self.kind} has no cool-down of its own")
        return self


class TrainConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How long to train and how often to do what."""

    steps: Annotated[int, may_change.IN_FORK] = Field(default=1000, ge=1, le=2**40)
    """Optimizer steps of the whole run."""
    tokens: Annotated[int | None, may_change.IN_FORK] = Field(default=None, ge=1, le=2**53)
    """The same in tokens, instead of `steps`: a multiple of `batch.tokens`. The run's configuration keeps the steps."""
    log_every: Annotated[int, may_change.WATCHED] = Field(default=10, ge=1)
    """Steps between lines on the terminal; the journal holds every step."""
    eval_every: Annotated[int, may_change.WATCHED] = Field(default=200, ge=1)
    """Steps between validations; the last step is always validated."""
    eval_tokens: Annotated[Annotated[int, Field(ge=1)] | Literal["all"] | None, may_change.WATCHED] = None
    """Held-out tokens of a validation, in whole windows, the same each time and spread over the sources; `all` of them.
    Unless given, a thirty-second of the tokens between two validations."""
    eval_whole_at_end: Annotated[bool, may_change.WATCHED] = True
    """The last validation is over all held-out text, whatever `eval_tokens` says."""
    checkpoint_every: Annotated[int, may_change.WATCHED] = Field(default=200, ge=1)
    """Steps between checkpoints; the first step, to see that the disk works, and the last always get one."""
    keep_checkpoints: Annotated[int, may_change.WATCHED] = Field(default=3, ge=1)
    """Newest checkpoints that stay on disk, beside the one with the lowest validation loss."""
    keep_every: Annotated[int | None, may_change.WATCHED] = Field(default=None, ge=1)
    """Checkpoints of steps that are a multiple of this stay for ever; none unless given."""
    sample_tokens: Annotated[int, may_change.WATCHED] = Field(default=100, ge=0)
    """Tokens of the text that is generated at each validation; none unless `data.objective` is `causal`."""

    @model_validator(mode="before")
    @classmethod
    def _steps_or_tokens(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("tokens") is None:
            return raw
        if raw.get("steps") is not None:
            raise ValueError(
                f"steps={raw['steps']} and tokens={raw['tokens']} both say how long to train; "
                "take one out, for example with train.steps=null"
            )
        return {key: value for key, value in raw.items() if key != "steps"}


class EngineConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """DeepSpeed ZeRO."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], may_change.COMPUTED] = 1
    """What is divided over the ranks: 0 nothing, 1 the optimizer's state, 2 gradients, too, 3 parameters, too."""
    precision: Annotated[Literal["bf16", "fp32", "fp16"], may_change.IN_FORK] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32; fp16 scales the loss, and needs CUDA."""
    offload: Annotated[Literal["none", "cpu"], may_change.COMPUTED] = "none"
    """`cpu` keeps the optimizer's state in the host's memory and updates there; stages 1 to 3."""
    hpz_partition_size: Annotated[int, may_change.COMPUTED] = Field(default=1, ge=1)
    """ZeRO 3: ranks (of one node) among which a second copy of the parameters is divided; needs CUDA."""
    activation_checkpointing: Annotated[bool, may_change.COMPUTED] = False
    """Keep only the input of each layer, and compute the layer again in the backward pass: less memory, more time."""
    compile: Annotated[bool, may_change.COMPUTED] = False
    """torch.compile of each layer; needs a C++ compiler where it runs."""
    sequence_parallel: Annotated[int, may_change.COMPUTED] = Field(default=1, ge=1)
    """Ranks (of one node) that share each sequence: a slice of it each, all of it for some heads in attention; for
    contexts that one GPU cannot hold. It divides `model.context` and the heads, those of keys and values, too."""
    timeout_minutes: Annotated[float, may_change.COMPUTED] = Field(default=10.0, gt=0.0, le=10080.0)
    """A collective that hangs longer ends the run."""

    @field_validator("offload", mode="before")
    @classmethod
    def _not_to_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError("nvme would move the optimizer's state out of a checkpoint's reach; use cpu")
        return value

    @model_validator(mode="after")
    def _the_stage_can_do_it(self) -> "EngineConfig":
        if self.zero_stage == 0 and self.offload != "none":
            raise ValueError("offload moves what ZeRO has divided, and zero_stage=0 divides nothing; use 1, 2 or 3")
        return self


class HealthConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How a run watches itself (docs/health.md)."""

    max_skipped: Annotated[int, may_change.WATCHED] = Field(default=10, ge=1)
    """Steps in a row without an update that end the run."""
    on_spike: Annotated[Literal["warn", "skip", "rollback"], may_change.WATCHED] = "warn"
    """What to do about a spike of the loss: only say so; leave out that step's update; or go back to a checkpoint and
    pass over the data read since."""
    spike_z: Annotated[float, may_change.WATCHED] = Field(default=6.0, gt=0.0)
    """A loss that is this many robust standard deviations above the recent median is a spike."""
    spike_window: Annotated[int, may_change.WATCHED] = Field(default=100, ge=8)
    """Steps whose losses are the measure; nothing is a spike before there are so many."""
    rollback_checkpoints: Annotated[int, may_change.WATCHED] = Field(default=1, ge=1)
    """Checkpoints to go back: 1 is the newest."""
    max_rollbacks: Annotated[int, may_change.WATCHED] = Field(default=3, ge=1)
    """Rollbacks of the whole run; the next spike ends it."""
    gc_every: Annotated[int, may_change.WATCHED] = Field(default=200, ge=1)
    """Steps between Python's garbage collections, which all ranks make at the same step."""
    hang_minutes: Annotated[float | None, may_change.WATCHED] = Field(default=None, gt=0.0)
    """Without progress for so long, each rank writes its stacks into the run folder. Below `engine.timeout_minutes`;
    half of it unless given."""


class TrackingConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """MLflow, the mirror of the run's journal."""

    mode: Annotated[Literal["online", "offline", "off"], may_change.WATCHED] = "online"
    """`offline`: `duet track sync` sends it later; `off`: the journal only, no MLflow."""
    uri: Annotated[str | None, may_change.WATCHED] = None
    """Tracking server or store; the sqlite file `mlflow.db` beside the run folder unless given."""
    experiment: Annotated[str, may_change.WATCHED] = Field(default="duet", min_length=1, max_length=500)
    """Name of the MLflow experiment."""
    masks: Annotated[Literal["summary", "all"], may_change.WATCHED] = "summary"
    """What MLflow gets of masks: nine numbers at most, or all that the journal has."""

    tensorboard: Annotated[bool, may_change.WATCHED] = False
    """Write TensorBoard's files into the run folder's `tensorboard/`, too; needs the extra `tensorboard`."""
    webhook: Annotated[str | None, may_change.WATCHED] = None
    """Where changes of the run's state are posted to: `https://…`, or `env:NAME` for what the environment holds."""

    @field_validator("webhook")
    @classmethod
    def _an_address_without_a_password(cls, webhook: str | None) -> str | None:
        if webhook is None or re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", webhook):
            return webhook
        if has_secret(webhook):
            raise ValueError("an address that holds a secret goes into the environment; name it as env:NAME")
        parts = urlsplit(webhook)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("expected https://HOST/…, http://HOST/…, or env:NAME")
        return webhook

    @field_validator("uri")
    @classmethod
    def _a_store_without_a_password(cls, uri: str | None) -> str | None:
        parts = urlsplit(uri or "")
        if uri and has_secret(uri):
            raise ValueError(WAY_ON)
        if uri and not uri.startswith("sqlite:///") and not (parts.scheme in ("http", "https") and parts.netloc):
            raise ValueError("expected http://HOST:PORT, https://HOST or sqlite:///PATH/mlflow.db")
        return uri

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class ProfileConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """torch's profiler on rank 0; what it writes is in the run folder's `profile/`."""

    steps: Annotated[tuple[int, int] | None, may_change.WATCHED] = None
    """First and last step to trace; a traced step is slower. None unless given."""

    @model_validator(mode="after")
    def _first_before_last(self) -> "ProfileConfig":
        if self.steps and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps={list(self.steps)}: expected [first, last] with 1 <= first <= last")
        return self


class FinetuneConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What is trained of the weights that `run.start_from` names (docs/after.md)."""

    kind: Annotated[Literal["none", "full", "lora"], may_change.IN_FORK] = "none"
    """`none`: the run goes on as the other would have, with its optimizer and its data. `full`: weights only, and all
    are trained, from step 0, on data of the run's own. `lora`: adapters beside linear maps are trained, and saved
    alone; `duet checkpoint export` adds them up."""
    rank: Annotated[int, may_change.IN_FORK] = Field(default=8, ge=1)
    """Of an adapter: inner size r of B A."""
    alpha: Annotated[float | None, may_change.IN_FORK] = Field(default=None, gt=0.0)
    """An adapter counts alpha / r times; 2 r unless given."""
    dropout: Annotated[float, may_change.IN_FORK] = Field(default=0.0, ge=0.0, lt=1.0)
    """On what adapters read, in training."""
    targets: Annotated[list[str] | None, may_change.IN_FORK] = Field(default=None, min_length=1)
    """Linear maps that are adapted: by the last part of a name, masks aside, or by a pattern of the whole, such as
    `backbone.layers.0.*`; `*` means all. All but those of masks unless given."""
    base: Annotated[str | None, may_change.IN_FORK] = None
    """Hash of the weights that the run has begun with; written by the run itself."""

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return (self.alpha or 2 * self.rank) / self.rank
