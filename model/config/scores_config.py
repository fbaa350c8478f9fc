"""Where the scores of self attention come from: queries and keys, or something cheaper. Free of torch."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

Synthesized = Literal["dense", "random", "factorised_dense", "factorised_random", "dot"]


class ScoresConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """What scores of self attention are made of (docs/attention.md). Cross attention and that of masks take q k^T."""

    kind: Literal["dot", "synthesizer", "linformer"] = "dot"
    """q k^T; tables by position and maps of the query's token alone; or q k^T over slots, each a sum of all keys."""
    parts: list[Synthesized] = Field(default=["dense"], min_length=1)
    """`synthesizer`: what scores are made of, several in a mixture that each head learns. `dense` is a map of the
    query's token, `random` a table, the others their forms of fewer parameters, `dot` is q k^T."""
    rank: int = Field(default=8, ge=1, le=2**31 - 1)
    """`synthesizer`: columns of the two factors of `factorised_random`."""
    trainable: bool = True
    """`synthesizer`: `random` is learned; else it stays as it was drawn."""
    slots: int = Field(default=128, ge=1, le=2**31 - 1)
    """`linformer`: so many sums of keys, and of values."""

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> "ScoresConfig":
        of = dict.fromkeys(("parts", "rank", "trainable"), "synthesizer") | {"slots": "linformer"}
        for key, kind in of.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind != kind:
                raise ValueError(f"scores.{key} is for scores.kind={kind}, not {self.kind}")
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"scores.parts: one is named twice in {', '.join(self.parts)}")
        if not self.trainable and "random" not in self.parts:
            raise ValueError("scores.trainable is about the part random; leave it out")
        if self.rank != type(self).model_fields["rank"].default and "factorised_random" not in self.parts:
            raise ValueError("scores.rank is about the part factorised_random; leave it out")
        return self

    @property
    def maps(self) -> int:
        """Of the query's token, C -> C each."""
        return sum(part in ("dense", "factorised_dense", "dot") for part in self.parts)

    def table_rows(self, context: int, width: int, heads: int) -> int:
        """Parameters of the tables of a layer."""
        size = {
            "dense": width * context,
            "random": heads * context**2 * self.trainable,
            "factorised_dense": width * sum(factors(context)),
            "factorised_random": 2 * heads * context * self.rank,
            "dot": 0,
        }
        return sum(size[part] for part in self.parts) + (heads * len(self.parts) if len(self.parts) > 1 else 0)

    def check(self, *, causal: bool, pattern: str, weights: str, kv_heads: bool, rotary: bool, documents: bool) -> None:
        """Raises ValueError unless it fits a model of these."""
        if self.kind == "dot":
            return
        if weights != "softmax":
            raise ValueError(f"weights.kind={weights} is for scores of queries and keys: leave it or scores.kind out")
        if self.kind == "synthesizer":
            if kv_heads:
                raise ValueError("scores.kind=synthesizer has no keys that kv_heads could share; leave it out")
            if rotary:
                raise ValueError(
                    "positions=rotary turns queries and keys, which scores.kind=synthesizer is without; take learned "
                    "or sinusoidal"
                )
        if self.kind == "linformer":
            if causal:
                raise ValueError(
                    "scores.kind=linformer sums keys over all positions before a mask could act, so earlier outputs "
                    "would change with later tokens (measured: by up to 0.93); it is for encoders that see both ways"
                )
            if pattern != "full" or documents:
                raise ValueError(
                    "scores.kind=linformer sums keys over all positions before a mask could act: leave "
                    f"{'document_mask' if documents else f'pattern.kind={pattern}'} out"
                )


def factors(context: int) -> tuple[int, int]:
    """Lengths of two vectors whose products are a row of scores: the divisors nearest to the root."""
    first = max(n for n in range(1, int(context**0.5) + 1) if context % n == 0)
    return first, context // first
