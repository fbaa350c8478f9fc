"""What block gates can be told: blocks of hidden units that a feed forward skips, token by token. Free of torch."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import EntropyConfig

GatedSite = Literal["enc_ff", "dec_ff"]
"""The feed forward of a stream."""


class GateEntropyConfig(EntropyConfig, frozen=True):
    """Penalty on gates that are neither open nor closed (docs/model.md B4): noise of training that evaluation lacks."""

    kind: Literal["shannon", "complement", "binary"] = "binary"
    """-m log2 m, the same of 1 - m, or their sum, which treats 0 and 1 alike."""


class BlockGatesConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Gates on blocks of a feed forward's hidden units, from what it reads; closed blocks are not computed.

    See docs/gates.md.
    """

    kind: Literal["none", "top", "cosine"] = "none"
    """`top` opens the likeliest blocks of each token, as many for each, and weighs them; `cosine` opens those with
    0.5 cos(angle) + 0.5 >= 0.5, a varying number."""
    sites: list[GatedSite] | None = Field(default=None, min_length=1)
    """Which feed forwards; those of each stream unless given."""
    blocks: int = Field(default=8, ge=2, le=2**31 - 1)
    """Blocks that the hidden units are cut into."""
    density: float = Field(default=0.25, gt=0.0, le=1.0)
    """Share of the blocks that a token opens: exactly with `top`; with `cosine` the mean that training holds."""
    std: float = Field(default=0.1, gt=0.0)
    """Standard deviation at the start of the map that gives the gates."""
    shift_init: float = Field(default=0.5, ge=0.0, le=3.1416)
    """`cosine`: start of the angle's bias in radians; 0 is a stationary start (m = 1)."""
    dual_rate: float = Field(default=0.003, gt=0.0)
    """`cosine`: what a step adds to the multiplier of a feed forward's penalty, for each unit that the mean of its m is
    above `density`."""
    entropy: GateEntropyConfig = GateEntropyConfig()
    """`cosine`: as that of learned dropout."""
    train_sparse_after: int | None = Field(default=None, ge=0)
    """`cosine`: after this step training, too, computes open blocks only; then the loss no longer tells a closed gate
    to open. Never unless given: until then all blocks are computed."""
    left: dict[str, int] = {}
    """Blocks of single feed forwards, such as `dec_ff/00: 5`, from which `duet checkpoint shrink` took others."""

    @property
    def num_open(self) -> int:
        """Blocks that a token opens with `top`."""
        return round(self.density * self.blocks)

    def sparse_at(self, step: int | None) -> bool:
        """Whether a step of training leaves closed blocks out; `step` None: whether any does."""
        if self.kind == "cosine":
            after = self.train_sparse_after
            return after is not None and (step is None or step > after)
        return self.kind == "top"

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> "BlockGatesConfig":
        if self.kind == "top":
            if self.num_open < 1 or abs(self.num_open - self.density * self.blocks) > 1e-6:
                below = max(1, int(self.density * self.blocks))
                near = " or ".join(f"{n / self.blocks:g}" for n in dict.fromkeys((below, min(below + 1, self.blocks))))
                raise ValueError(
                    f"block_gates.density={self.density:g} of blocks={self.blocks} is no whole number of blocks, which "
                    f"kind=top opens; nearest: {near}"
                )
            default = BlockGatesConfig()
            for key in ("shift_init", "dual_rate", "entropy", "train_sparse_after"):
                if getattr(self, key) != getattr(default, key):
                    raise ValueError(f"block_gates.{key} is about kind=cosine; leave it out")
        if len(set(self.sites or ())) < len(self.sites or ()):
            raise ValueError(f"block_gates.sites: a site is named twice in {', '.join(self.sites or ())}")
        return self
