"""Configuration and costs of the Feedback Transformer. Free of torch."""

from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from model.config.mask_config import LearnedDropoutConfig
from model.config.model_config import Traits
from model.config.transformer import TransformerConfig
from model.costs.parts import (
    Costs,
    Part,
    Shape,
    embedded,
    end,
    feed_forward,
    head,
    linear_weights,
    norm,
    norm_weights,
)

if TYPE_CHECKING:
    from model.architectures.feedback.model import Feedback

LONGEST = 1024
"""Tokens of a context, which are read one after the other."""


class FeedbackConfig(TransformerConfig, frozen=True):
    """A decoder whose lower layers read the upper layers of earlier tokens, so that tokens come one after the other."""

    traits: ClassVar = Traits(
        objectives=("causal",),
        because="writes a memory of each token before it reads the next",
        sites=("dec_ff", "dec_sa", "embed"),
        cached=True,
        in_turn=True,
        lacks="writes one memory after the other",
    )

    architecture: Literal["feedback"] = "feedback"
    memory: int | None = Field(default=None, ge=1)
    """Memories that a token reads, the last ones; all before it unless given."""

    @property
    def why_heads_stay(self) -> str:
        """Its layers share keys and values."""
        return "feedback has one memory of keys and values for all its layers"

    @property
    def why_not_compiled(self) -> str:
        """Its tokens come one after the other."""
        return f"model.architecture=feedback takes {self.context} steps for a text, each of other shapes; leave it out"

    @property
    def why_not_partitioned(self) -> str:
        """Its tokens come one after the other."""
        return (
            f"model.architecture=feedback takes {self.context} steps for a text, and ZeRO 3 would gather every weight "
            "in each; take stage 2"
        )

    @property
    def segment(self) -> int:
        """Tokens that are read in one call of the stack: what activation checkpointing computes again at a time."""
        return ceil(self.context**0.5)

    def costs(self, shape: Shape) -> Costs:
        """L layers of queries and feed forward, and one map to keys and values for all of them.

        FLOPs are those that are executed: token t reads t memories and the null memory, T (T + 1) / 2 in all. What is
        kept for the backward pass is an estimate; most of a long text's are the keys and values of each step.
        """
        tokens, width, layers = shape.inputs, self.width, self.layers
        keys = width // self.queries_per_kv_head
        seen = sum(min(token, self.memory or token) + 1 for token in range(tokens))
        maps = 2 * linear_weights(self, width, width) * layers
        flops = layers * (tokens * 4 * width**2 + 4 * seen * width)
        ff = feed_forward(shape, tokens, "layers: feed forward")
        mixed = layers + 1 + width + norm_weights(self) + linear_weights(self, width, 2 * keys)
        parts = [
            Part("layers: attention", maps, flops),
            *[ff._replace(saved=0)] * layers,
            Part("norms", 2 * layers * norm_weights(self)),
            Part("memory", mixed, (tokens + 1) * 4 * width * keys),
        ]
        vectors, normed = shape.vectors(tokens), norm(shape, tokens).saved
        kept = layers * (ff.saved + 2 * normed + 4 * vectors) + normed + (layers + 2) * vectors
        kept += (2 if self.dropout else 0) * layers * vectors
        read = shape.rows * seen * shape.size
        kept += 2 * keys * read + (2 * width * read * layers if self.queries_per_kv_head > 1 else 0)
        if self.attention == "explicit" or self.attention_rate:
            kept += layers * self.heads * read * 2
        calls = ceil(tokens / self.segment)
        inputs = vectors + 2 * keys * shape.rows * shape.size * sum(
            min(call * self.segment, self.memory or tokens) + 1 for call in range(calls)
        )
        outside = [*embedded(shape, tokens), *parts, *end(shape), *head(shape)]
        return Costs(outside, [(calls, [Part(saved=kept // calls)])], inputs)

    def build(self) -> "Feedback":
        """The layers."""
        from model.architectures.feedback.model import Feedback

        return Feedback(self)

    @model_validator(mode="after")
    def _a_token_at_a_time(self) -> "FeedbackConfig":
        if self.context > LONGEST:
            raise ValueError(
                f"context={self.context}: feedback reads a text token by token, in training, too, so each step of "
                f"training would take {self.context} steps through all layers, one after the other; take {LONGEST} or "
                "less, or architecture=decoder_only"
            )
        masks = {
            "learned_dropout": self.learned_dropout.enabled and self.learned_dropout != LearnedDropoutConfig(),
            "l0": self.l0.enabled,
            "block_gates": self.block_gates.kind != "none",
        }
        for key, stands in masks.items():
            if stands:
                raise ValueError(
                    f"{key}: feedback computes one token at a time, and its masks would draw, look back and be told of "
                    "token by token; leave it out"
                )
        if self.pattern.kind != "full":
            raise ValueError(
                f"pattern.kind={self.pattern.kind}: feedback reads memories, of which model.memory says how many; "
                "leave the pattern out"
            )
        if self.scores.kind != "dot":
            raise ValueError(f"scores.kind={self.scores.kind}: feedback reads memories by q k^T; leave it out")
        if self.weights.kind != "softmax":
            raise ValueError(f"weights.kind={self.weights.kind}: feedback reads memories by a softmax; leave it out")
        return self
