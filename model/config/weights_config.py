"""How scores of attention become weights: a softmax, entmax with exact zeros, or a span that each head learns."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import PenaltyConfig

WeightsKind = Literal["softmax", "entmax", "adaptive_span"]


class SpanPenaltyConfig(PenaltyConfig, frozen=True):
    """Penalty on spans, in tokens (docs/attention.md). Starts late: a span closes before its head has learned."""

    weight: float = Field(default=1e-3, ge=0.0)
    """Factor of the mean span in tokens, from the end of the ramp on."""
    start_step: int = Field(default=1000, ge=0)
    """First step at which the term counts."""
    ramp_steps: int = Field(default=1000, ge=0)
    """Steps of linear rise; 0 switches the whole weight on at `start_step`."""


class WeightsConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How the scores of self and cross attention become weights (docs/attention.md). Those of masks take a softmax."""

    kind: WeightsKind = "softmax"
    """`entmax` gives keys of low scores a weight of exactly 0; by `adaptive_span` each head learns how far it looks."""
    alpha: float | None = Field(default=None, ge=1.01, le=2.0)
    """`entmax`: near 1 a softmax, 2 the sparsest. Learned by each head, from 1.5 on, unless given."""
    max_span: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """`adaptive_span`: tokens of the longest span; the context unless given."""
    span_init: float = Field(default=1.0, ge=0.0, le=1.0)
    """`adaptive_span`: share of it that a span begins with. One that begins short never sees why it should grow."""
    ramp: int = Field(default=32, ge=1, le=2**31 - 1)
    """`adaptive_span`: tokens beyond the span over which weights fall to 0."""
    penalty: SpanPenaltyConfig = SpanPenaltyConfig()

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> "WeightsConfig":
        of = {"alpha": "entmax"} | dict.fromkeys(("max_span", "span_init", "ramp", "penalty"), "adaptive_span")
        for key, kind in of.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind != kind:
                raise ValueError(f"weights.{key} is for weights.kind={kind}, not {self.kind}")
        return self

    @property
    def learned(self) -> bool:
        """Each head has a parameter of its own."""
        return self.kind == "adaptive_span" or (self.kind == "entmax" and self.alpha is None)

    def shapes(self, *, aligned: bool) -> bool:
        """They are other than a softmax's; `aligned`: in attention over one text, in which distances mean something."""
        return self.kind == "entmax" or (self.kind == "adaptive_span" and aligned)
