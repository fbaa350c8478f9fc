"""Configuration and costs of an encoder-decoder of two sequences. Free of torch."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from model.config.mask_config import Site
from model.config.model_config import Traits
from model.config.transformer import TwoStreamConfig
from model.costs.parts import Costs, Shape, cross_layer, embedded, end, head, last_output, one_stream

if TYPE_CHECKING:
    from model.architectures.encoder_decoder.model import EncoderDecoder


class EncoderDecoderConfig(TwoStreamConfig, frozen=True):
    """An encoder of one sequence and a decoder of another, as T5."""

    traits: ClassVar = Traits(
        objectives=("span_corruption", "pairs"),
        because="reads one text and writes another, such as what is missing",
        sites=("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"),
        default_sites=("enc_ff", "dec_ff"),
        causal=False,
        why_not_continued="encoder_decoder was trained to write the spans that are missing in a text, not to continue "
        "a prompt",
        two_sequences=True,
        lacks="reads one sequence and writes another",
    )

    architecture: Literal["encoder_decoder"] = "encoder_decoder"

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that a sample of N holds for the encoder, and labels, under span corruption.

        It cuts out 15 % in spans of 3 in the mean; each leaves a token in the input and is headed by it in the labels,
        and an end is added to both (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4).
        """
        noise = max(round(self.context * 0.15), 1)
        spans = max(round(noise / 3), 1)
        return self.context - noise + spans + 1, noise + spans + 1

    def masks_at(self, site: Site) -> int:
        """How many layers have a site; both sequences are embedded."""
        return 2 if site == "embed" else self.layers

    def costs(self, shape: Shape) -> Costs:
        """L encoder layers over the inputs, L decoder layers over the targets; both sequences are embedded."""
        inputs, targets = shape.inputs, shape.targets
        sites: tuple[Site, Site] = ("enc_sa", "enc_ff")
        each = shape.by_pattern(self.layers)
        encoder = [(n, one_stream(of, inputs, sites, stream="encoder")) for n, of in each]
        decoder = [(n, cross_layer(of, targets, inputs, aligned=False)) for n, of in each]
        written = embedded(shape, targets, causal=True, again=True)
        outside = [*embedded(shape, inputs), *written, *end(shape), *head(shape)]
        kept = (self.layers + 1) * shape.vectors(inputs) + self.layers * shape.vectors(targets)
        return Costs(outside, [*encoder, *decoder, (1, last_output(shape, inputs))], kept)

    def build(self) -> "EncoderDecoder":
        """The layers."""
        from model.architectures.encoder_decoder.model import EncoderDecoder

        return EncoderDecoder(self)

    @model_validator(mode="after")
    def _span_corruption_leaves_a_text(self) -> "EncoderDecoderConfig":
        if max(self.lengths) > self.context:
            raise ValueError(
                f"context={self.context}: of so few tokens span corruption makes {self.lengths[0]}; take 10 or more"
            )
        return self
