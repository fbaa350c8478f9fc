"""Configuration and costs of a decoder-only model. Free of torch."""

from typing import TYPE_CHECKING, ClassVar, Literal

from model.config.model_config import Traits
from model.config.transformer import TransformerConfig
from model.costs.parts import Costs, Shape, embedded, end, head, one_stream
from model.costs.recurrence import recurrence, repeated

if TYPE_CHECKING:
    from model.architectures.decoder_only.model import DecoderOnly


class DecoderOnlyConfig(TransformerConfig, frozen=True):
    """The plain baseline, by default in the shape of GPT-2."""

    traits: ClassVar = Traits(
        objectives=("causal", "prefix", "pairs", "conversations"),
        because="predicts each token from those before it",
        sites=("dec_ff", "dec_sa", "embed"),
        cached=True,
        documents_apart=True,
        shared=True,
        recurrent=True,
        default_sites=("dec_ff",),
        lacks="has no second stream",
    )

    architecture: Literal["decoder_only"] = "decoder_only"

    def costs(self, shape: Shape) -> Costs:
        """L layers of one stream."""
        layers = [(n, one_stream(of, shape.inputs, ("dec_sa", "dec_ff"))) for n, of in shape.by_pattern(self.layers)]
        outside = [*embedded(shape, shape.inputs), *recurrence(shape, shape.inputs), *end(shape), *head(shape)]
        return Costs(outside, repeated(self, layers), shape.vectors(shape.inputs) * self.depth)

    def build(self) -> "DecoderOnly":
        """The layers."""
        from model.architectures.decoder_only.model import DecoderOnly

        return DecoderOnly(self)
