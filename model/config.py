"""What a model can be told. Free of torch: login nodes read this."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

Site = Literal["enc_ff", "dec_ff"]


class PenaltyConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Weight of one penalty term: 0 before `start_step`, then linear over `ramp_steps` up to `weight`."""

    kind: str
    weight: float = Field(ge=0.0)
    start_step: int = Field(default=0, ge=0)
    ramp_steps: int = Field(default=0, ge=0)


class EntropyConfig(PenaltyConfig):
    """Penalty on mask values that are neither 0 nor 1 (specification B4)."""

    kind: Literal["shannon", "complement", "binary"] = "shannon"
    weight: float = Field(default=0.02, ge=0.0)


class L1Config(PenaltyConfig):
    """Penalty on open gates (specification B5)."""

    kind: Literal["linear", "squared"] = "linear"
    weight: float = Field(default=0.01, ge=0.0)


class LearnedDropoutConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A mask computed from the input by causal attention: m = 0.5 cos(angle) + 0.5."""

    enabled: bool = True
    sites: list[Site] = ["enc_ff", "dec_ff"]
    """Which outputs are masked; a decoder-only model has `dec_ff` alone."""
    shift_init: float = Field(default=0.5, ge=0.0, le=3.1416)
    """Start value of the shift B [C] in the angle; 0 is a stationary start (m = 1)."""
    rounding: Literal["none", "noise_ste"] = "noise_ste"
    """Training: `noise_ste` keeps an element with probability m, straight-through gradient; `none` scales by m."""
    eval_rounding: Literal["none", "threshold"] = "threshold"
    """Evaluation: `threshold` keeps an element when m >= 0.5; `none` scales by m."""
    entropy: EntropyConfig = EntropyConfig()
    l1: L1Config = L1Config()


class ModelConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """One of the architectures, and its shape."""

    architecture: Literal["parallel_encoder_decoder", "decoder_only"] = "parallel_encoder_decoder"
    layers: int = Field(default=3, ge=1)
    """Layers of each stream."""
    width: int = Field(default=128, ge=1)
    """C, the size of the residual stream."""
    heads: int = Field(default=4, ge=1)
    """Heads of self attention and of the mask attention."""
    cross_heads: int | None = Field(default=None, ge=1)
    """Heads of cross attention; twice `heads` unless given."""
    context: int = Field(default=256, ge=2)
    """Tokens a sample holds, and the length of the position table."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Taken from the dataset's tokenizer unless given."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    decoder_input_std: float | None = Field(default=None, gt=0.0)
    """Standard deviation of W_dec at the start; width^-0.5 unless given (0.02 starves the decoder)."""
    learned_dropout: LearnedDropoutConfig = LearnedDropoutConfig()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        for key, heads in (("heads", self.heads), ("cross_heads", self.cross_heads or 2 * self.heads)):
            if self.width % heads:
                raise ValueError(f"{key}={heads} does not divide width={self.width}")
        return self
