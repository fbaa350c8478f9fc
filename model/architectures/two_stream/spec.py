"""Configuration and costs of XLNet: two streams over a text in a random order. Free of torch."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from model.config.model_config import Traits
from model.config.transformer import TransformerConfig
from model.costs.parts import Costs, Part, Shape, embedded, end, head, one_stream

if TYPE_CHECKING:
    from model.architectures.backbone import Backbone
    from model.architectures.two_stream.model import TwoStreams


class PermutationConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The order in which a text is read in training, and which of its tokens are predicted."""

    share: float = Field(default=1 / 6, gt=0.0, le=1.0)
    """1 / K: of the order, the last tokens that are predicted (XLNet: K = 6 or 7). 1 predicts all but the first."""
    span: int = Field(default=1, ge=1)
    """The order is one of spans of 1 to so many neighbours, of random length, each read from left to right."""


class XLNetConfig(TransformerConfig, frozen=True):
    """XLNet: a stream of what tokens are, and one of what is asked, over a text in a random order."""

    traits: ClassVar = Traits(
        objectives=("permutation",),
        because="learns from a text in random orders",
        sites=("dec_ff", "dec_sa", "embed"),
        cached=True,
        default_sites=("dec_ff",),
        lacks="reads all tokens of a row in one random order, so the first of a document would be predicted from none",
    )

    architecture: Literal["two_stream"] = "two_stream"
    permutation: PermutationConfig = PermutationConfig()

    @property
    def uses_next_position(self) -> bool:
        """The query of the last token stands one place behind the context."""
        return True

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that are read of a sample, and tokens that are predicted."""
        return self.context, max(1, round(self.permutation.share * self.context))

    @property
    def target_span(self) -> int:
        """See `PermutationConfig.span`."""
        return self.permutation.span

    @property
    def sees_in_blocks(self) -> bool:
        """What only asks has a form of its own."""
        return False

    def costs(self, shape: Shape) -> Costs:
        """L layers over T tokens and the queries of those that are predicted, which see the T tokens.

        Keys and values of queries are computed, since they come with the queries' own map, and left.
        """
        tokens, asking = shape.inputs + shape.targets, replace(shape, asking=shape.targets)
        layers = [(n, one_stream(of, tokens, ("dec_sa", "dec_ff"))) for n, of in asking.by_pattern(self.layers)]
        outside = [*embedded(asking, tokens), Part("query start", self.width), *end(shape), *head(shape)]
        if not shape.post and shape.norm_keeps_input:  # the last norm reads the queries out of both streams
            outside.append(Part(saved=shape.vectors(shape.inputs)))
        return Costs(outside, layers, shape.vectors(tokens) * self.layers)

    def build(self) -> "Backbone":
        """The layers."""
        from model.architectures.two_stream.model import ContentAndQuery

        return ContentAndQuery(self)

    def assemble(self, backbone: "Callable[[], Backbone]") -> "TwoStreams":
        """Tables first, then the layers."""
        from model.architectures.two_stream.model import TwoStreams

        return TwoStreams(self, backbone)

    @model_validator(mode="after")
    def _a_query_sees_something(self) -> "XLNetConfig":
        none = "which may be none in a random order, and a softmax over nothing is none; leave it out"
        if self.pattern.kind != "full":
            raise ValueError(
                f"pattern.kind={self.pattern.kind}: a query would see what is near and was read before, {none}"
            )
        if self.scores.kind != "dot":
            raise ValueError(
                f"scores.kind={self.scores.kind}: the two streams share keys, which queries find by q k^T; leave it out"
            )
        if self.weights.kind == "adaptive_span":
            raise ValueError(f"weights.kind=adaptive_span: a query would see its span of what was read before, {none}")
        return self
