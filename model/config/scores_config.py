"""Where the scores of self attention come from: queries and keys, or something cheaper. Free of torch."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config.pattern_config import FEWEST

Synthesized = Literal["dense", "random", "factorised_dense", "factorised_random", "dot"]


class ScoresConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """What scores of self attention are made of (docs/attention.md). Cross attention and that of masks take q k^T."""

    kind: Literal["dot", "synthesizer", "linformer", "routing"] = "dot"
    """q k^T; tables by position and maps of the query's token alone; q k^T over slots, each a sum of all keys; or q k^T
    within clusters of tokens."""
    parts: list[Synthesized] = Field(default=["dense"], min_length=1)
    """`synthesizer`: what scores are made of, several in a mixture that each head learns. `dense` is a map of the
    query's token, `random` a table, the others their forms of fewer parameters, `dot` is q k^T."""
    rank: int = Field(default=8, ge=1, le=2**31 - 1)
    """`synthesizer`: columns of the two factors of `factorised_random`."""
    trainable: bool = True
    """`synthesizer`: `random` is learned; else it stays as it was drawn."""
    slots: int = Field(default=128, ge=1, le=2**31 - 1)
    """`linformer`: so many sums of keys, and of values."""
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    """`linformer`: what has sums in common: nothing; heads of a layer; these, keys and values; or all layers, too."""
    clusters: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """`routing`: of each routed head; √context unless given."""
    window: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """`routing`: tokens that a head which is not routed sees; context / clusters unless given."""
    routed_heads: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """`routing`: the last so many heads; half of them unless given."""
    cluster_window: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """`routing`: of its cluster a token sees the last so many, so that less is computed of a long text; to either side
    where a text is read both ways. All of them unless given."""
    decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    """`routing`: what a step leaves of a centroid; the rest is the mean of its tokens."""
    assign: Literal["argmax", "balanced"] = "argmax"
    """`routing`: each token goes to the centroid that is most like it; or each centroid takes the context / clusters
    tokens that are most like it, as published: for encoders that see both ways."""

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> "ScoresConfig":
        of = dict.fromkeys(("parts", "rank", "trainable"), "synthesizer")
        of |= dict.fromkeys(("slots", "sharing"), "linformer")
        of |= dict.fromkeys(("clusters", "window", "routed_heads", "cluster_window", "decay", "assign"), "routing")
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

    def slot_weights(self, context: int, heads: int) -> int:
        """Parameters of the sums that are a layer's own."""
        tables = {"none": 2 * heads, "headwise": 2, "key_value": 1, "layerwise": 0}
        return tables[self.sharing] * self.slots * context

    def shared_slot_weights(self, context: int) -> int:
        """Of those that all layers share."""
        return self.slots * context if self.kind == "linformer" and self.sharing == "layerwise" else 0

    def clusters_at(self, context: int) -> int:
        """Centroids of a routed head: √n is the cheapest (arXiv:2003.05997, section 4.1)."""
        return self.clusters or round(context**0.5)

    def routed_heads_of(self, heads: int) -> int:
        """Heads that look at clusters."""
        return self.routed_heads or max(1, heads // 2)

    def window_at(self, context: int) -> int:
        """Tokens that a head which is not routed sees."""
        return self.window or -(-context // self.clusters_at(context))

    def sorts(self, queries: int, keys: int, context: int) -> bool:
        """Whether a text is sorted by cluster: with a `cluster_window`, where it pays (benchmarks/attention.md)."""
        if self.kind != "routing" or self.cluster_window is None:
            return False
        return keys == queries >= max(FEWEST, 4 * self.cluster_window, 4 * self.window_at(context))

    def check(
        self,
        *,
        heads: int,
        context: int,
        causal: bool,
        pattern: str,
        weights: str,
        kv_heads: bool,
        rotary: bool,
        documents: bool,
    ) -> None:
        """Raises ValueError unless it fits a model of these."""
        if self.kind == "dot":
            return
        if weights != "softmax":
            raise ValueError(f"weights.kind={weights} is for scores of queries and keys: leave it or scores.kind out")
        if kv_heads and self.kind != "linformer":
            has = "has no keys" if self.kind == "synthesizer" else "takes queries for keys, which is none"
            raise ValueError(f"scores.kind={self.kind} {has} that kv_heads could share; leave it out")
        if rotary and self.kind == "synthesizer":
            raise ValueError(
                "positions=rotary turns queries and keys, which scores.kind=synthesizer is without; take learned or "
                "sinusoidal"
            )
        if self.kind == "routing":
            self._check_routing(causal, rotary, documents, heads, context)
            if self.cluster_window and (self.assign == "balanced" or pattern != "full"):
                raise ValueError(
                    "scores.cluster_window counts the tokens of a cluster "
                    + ("which assign=balanced has of one size" if self.assign == "balanced" else "that a pattern hides")
                    + f": leave {'it' if self.assign == 'balanced' else f'pattern.kind={pattern}'} out"
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

    def _check_routing(self, causal: bool, rotary: bool, documents: bool, heads: int, context: int) -> None:
        if rotary:
            raise ValueError(
                "positions=rotary turns a token by its place, and scores.kind=routing looks for tokens that are alike "
                "wherever they stand; take learned or sinusoidal"
            )
        if self.routed_heads_of(heads) > heads:
            raise ValueError(f"scores.routed_heads={self.routed_heads}, and there are heads={heads}")
        if self.clusters_at(context) > context:
            raise ValueError(f"scores.clusters={self.clusters}, and a text has context={context} tokens")
        if self.assign == "balanced" and (causal or documents):
            raise ValueError(
                "scores.assign=balanced: which tokens a centroid takes depends on all others of the row, later ones "
                "and other documents' too (measured: logits before a changed token move by up to 0.47); take argmax"
                + (", or leave document_mask out" if documents and not causal else "")
            )


def factors(context: int) -> tuple[int, int]:
    """Lengths of two vectors whose products are a row of scores: the divisors nearest to the root."""
    first = max(n for n in range(1, int(context**0.5) + 1) if context % n == 0)
    return first, context // first
