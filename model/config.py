"""What a model can be told. Free of torch: login nodes read this."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

Architecture = Literal["parallel_encoder_decoder", "decoder_only"]
Site = Literal["enc_ff", "dec_ff"]

SITES: dict[Architecture, tuple[Site, ...]] = {
    "parallel_encoder_decoder": ("enc_ff", "dec_ff"),
    "decoder_only": ("dec_ff",),
}
"""Where learned dropout can stand in a layer of each architecture."""


class PenaltyConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
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


class LearnedDropoutConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """A mask computed from the input by causal attention: m = 0.5 cos(angle) + 0.5 (docs/model.md B)."""

    enabled: bool = True
    """Off: no masks, no penalties."""
    sites: list[Site] | None = Field(default=None, min_length=1)
    """Which outputs are masked; all that the architecture has unless given."""
    shift_init: float = Field(default=0.5, ge=0.0, le=3.1416)
    """Start value of the shift B [C] in the angle, in radians; 0 is a stationary start (m = 1)."""
    rounding: Literal["none", "noise_ste"] = "noise_ste"
    """Training: `noise_ste` keeps an element with probability m, straight-through gradient; `none` scales by m."""
    eval_rounding: Literal["none", "threshold"] = "threshold"
    """Evaluation: `threshold` keeps an element when m >= 0.5; `none` scales by m."""
    entropy: EntropyConfig = EntropyConfig()
    l1: L1Config = L1Config()


class ModelConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """One of the architectures, and its shape."""

    architecture: Architecture = "parallel_encoder_decoder"
    """Two causal streams side by side, or the plain baseline."""
    layers: int = Field(default=3, ge=1)
    """Layers of each stream."""
    width: int = Field(default=128, ge=1)
    """C, the size of the residual stream."""
    heads: int = Field(default=4, ge=1)
    """Heads of self attention and of the mask attention."""
    cross_heads: int | None = Field(default=None, ge=1)
    """Heads of cross attention; twice `heads` unless given."""
    context: int = Field(default=256, ge=2)
    """N, the tokens a sample holds and the length of the position table."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Taken from the dataset's tokenizer unless given."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    decoder_input_std: float | None = Field(default=None, gt=0.0)
    """Standard deviation of W_dec at the start; width^-0.5 unless given (0.02 starves the decoder)."""
    learned_dropout: LearnedDropoutConfig = LearnedDropoutConfig()

    @property
    def num_cross_heads(self) -> int:
        """Heads of cross attention."""
        return self.cross_heads or 2 * self.heads

    @property
    def dropout_sites(self) -> tuple[Site, ...]:
        """Sites of learned dropout in each layer; none when it is off."""
        if not self.learned_dropout.enabled:
            return ()
        return tuple(self.learned_dropout.sites or SITES[self.architecture])

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        heads = {"heads": self.heads}
        if self.architecture == "parallel_encoder_decoder":
            heads["cross_heads"] = self.num_cross_heads
        for key, count in heads.items():
            if self.width % count:
                raise ValueError(f"{key}={count} does not divide width={self.width}")
        return self

    @model_validator(mode="after")
    def _architecture_has_it(self) -> "ModelConfig":
        valid = SITES[self.architecture]
        for site in self.learned_dropout.sites or ():
            if site not in valid:
                raise ValueError(
                    f"learned_dropout.sites: {self.architecture} has no site {site}; it has {', '.join(valid)}"
                )
        if self.architecture == "decoder_only":
            for key in ("cross_heads", "decoder_input_std"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: decoder_only has no second stream; leave it out")
        return self
