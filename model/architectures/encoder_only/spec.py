"""Configuration and costs of an encoder-only model. Free of torch."""

from typing import TYPE_CHECKING, ClassVar, Literal

from model.config.model_config import Traits
from model.config.transformer import TransformerConfig
from model.costs.parts import Costs, Shape, embedded, end, head, one_stream
from model.costs.recurrence import recurrence, repeated

if TYPE_CHECKING:
    from model.architectures.encoder_only.model import EncoderOnly


class EncoderOnlyConfig(TransformerConfig, frozen=True):
    """An encoder that fills masked places, as BERT."""

    traits: ClassVar = Traits(
        objectives=("masked",),
        because="sees every token, the next one included, so some have to be hidden from it",
        sites=("enc_ff", "enc_sa", "embed"),
        documents_apart=True,
        shared=True,
        recurrent=True,
        default_sites=("enc_ff",),
        causal=False,
        why_not_continued="encoder_only fills masked places from both sides: it has no next token to draw",
        lacks="has no second stream",
    )

    architecture: Literal["encoder_only"] = "encoder_only"

    def costs(self, shape: Shape) -> Costs:
        """L layers of one stream."""
        layers = [(n, one_stream(of, shape.inputs, ("enc_sa", "enc_ff"))) for n, of in shape.by_pattern(self.layers)]
        outside = [*embedded(shape, shape.inputs), *recurrence(shape, shape.inputs), *end(shape), *head(shape)]
        return Costs(outside, repeated(self, layers), shape.vectors(shape.inputs) * self.depth)

    def build(self) -> "EncoderOnly":
        """The layers."""
        from model.architectures.encoder_only.model import EncoderOnly

        return EncoderOnly(self)
