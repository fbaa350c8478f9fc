"""What learned masks can be told: where they stand, how they are made, what they cost. Free of torch."""

from typing import Literal, get_args

from pydantic import BaseModel, Field

Site = Literal["enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed", "draft_ff", "draft_sa", "draft_cross"]
"""What is masked: the update of a feed forward, of a self attention, of cross attention, or the embedded tokens;
`draft_` of a decoder that drafts."""

EvalRounding = Literal["none", "threshold", "sample"]
EVAL_ROUNDINGS: tuple[EvalRounding, ...] = get_args(EvalRounding)


class PenaltyConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Weight of a penalty term: 0 before `start_step`, then linear over `ramp_steps` up to `weight`."""

    weight: float = Field(ge=0.0)
    """Factor of the mean over all mask elements, from the end of the ramp on."""
    start_step: int = Field(default=0, ge=0)
    """First step at which the term counts."""
    ramp_steps: int = Field(default=0, ge=0)
    """0 switches the whole weight on at `start_step`."""


class EntropyConfig(PenaltyConfig, frozen=True):
    """Penalty on mask values that are neither 0 nor 1 (docs/model.md B4). Starts late: L1 decides first."""

    kind: Literal["shannon", "complement", "binary"] = "shannon"
    """-m log2 m, the same of 1 - m, or their sum, which treats 0 and 1 alike."""
    weight: float = Field(default=0.02, ge=0.0)
    """Factor of the mean entropy in bits, from the end of the ramp on."""
    start_step: int = Field(default=1000, ge=0)
    """First step at which the term counts."""
    ramp_steps: int = Field(default=1000, ge=0)
    """Steps of linear rise; 0 switches the whole weight on at `start_step`."""


class L1Config(PenaltyConfig, frozen=True):
    """Penalty on open masks (docs/model.md B5)."""

    kind: Literal["linear", "squared"] = "linear"
    """m, or m²/2."""
    weight: float = Field(default=0.01, ge=0.0)
    """Factor of the mean, from the end of the ramp on."""


class LearnedDropoutConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A mask that the model computes: m = 0.5 cos(angle) + 0.5 (docs/model.md B)."""

    enabled: bool = True
    """Off: no masks, no penalties."""
    sites: list[Site] | None = Field(default=None, min_length=1)
    """What is masked; the feed forwards of each stream unless given."""
    source: Literal["attention", "embed", "low_rank", "elementwise"] = "attention"
    """What gives the angle: causal attention over the tensor that is masked, over one shared attention over the
    embedded tokens, a linear map of rank width / 4 of each token that is masked, or the tensor itself, element by
    element."""
    detach_embed: bool = False
    """With source `embed`: the masks send no gradient into the embedded tokens."""
    shift_init: float = Field(default=0.5, ge=0.0, le=3.1416)
    """Start value of the shift B [C] in the angle, in radians; 0 is a stationary start (m = 1)."""
    rounding: Literal["none", "sigmoid", "sigmoid_ste", "noise_ste", "threshold_ste"] = "noise_ste"
    """Training: `noise_ste` keeps an element with probability m, `threshold_ste` when m >= 0.5, `sigmoid` scales by
    sigmoid(60 (m - 0.5)), `none` by m. `_ste`: the gradient with respect to m is 1."""
    eval_rounding: EvalRounding = "threshold"
    """Evaluation: `threshold` keeps an element when m >= 0.5, `sample` with probability m, `none` scales by m."""
    eval_seed: int = 0
    """Keys the draws of `sample`, which depend on it, the site and the position only."""
    entropy: EntropyConfig = EntropyConfig()
    l1: L1Config = L1Config()


class L0Config(PenaltyConfig, frozen=True):
    """Hard-concrete gates, one for each channel of a site, in the place of learned dropout (docs/model.md D).

    "Learning Sparse Neural Networks through L0 Regularization" (Louizos, Welling and Kingma 2018).
    """

    enabled: bool = False
    """On: gates and their penalty; `learned_dropout.enabled` must be off."""
    sites: list[Site] | None = Field(default=None, min_length=1)
    """What is gated; the feed forwards of each stream unless given."""
    open_init: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Probability at the start that a gate is not 0."""
    weight: float = Field(default=0.01, ge=0.0)
    """Factor of the mean probability that a gate is not 0, from the end of the ramp on."""
