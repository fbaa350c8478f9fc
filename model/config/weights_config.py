"""How scores of attention become weights: a softmax, entmax with exact zeros, or a span that each head learns."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

WeightsKind = Literal["softmax", "entmax"]


class WeightsConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """How the scores of self and cross attention become weights (docs/attention.md). Those of masks take a softmax."""

    kind: WeightsKind = "softmax"
    """`entmax` gives keys of low scores a weight of exactly 0."""
    alpha: float | None = Field(default=None, ge=1.01, le=2.0)
    """`entmax`: near 1 a softmax, 2 the sparsest. Learned by each head, from 1.5 on, unless given."""

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> "WeightsConfig":
        of = {"alpha": "entmax"}
        for key, kind in of.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind != kind:
                raise ValueError(f"weights.{key} is for weights.kind={kind}, not {self.kind}")
        return self

    @property
    def learned(self) -> bool:
        """Each head has a parameter of its own."""
        return self.kind == "entmax" and self.alpha is None
