"""Configuration and costs of the encoder-decoder of two streams over one text. Free of torch."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import Site
from model.config.model_config import Traits
from model.config.transformer import TwoStreamConfig
from model.costs.parts import (
    Costs,
    Part,
    Shape,
    cross_layer,
    embedded,
    end,
    head,
    last_output,
    linear,
    norm,
    one_stream,
)
from model.costs.recurrence import recurrence, repeated

if TYPE_CHECKING:
    from model.architectures.parallel_encoder_decoder.model import ParallelEncoderDecoder


class EncoderLossConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A loss between the running mean of the embedded tokens and the encoder's output (docs/model.md A7)."""

    kind: Literal["none", "mse", "cosine", "log_cosine"] = "none"
    """Mean of (a - z)², of 1 - (cos(a, z) + 1) / 2, or of -log((cos(a, z) + 1) / 2)."""
    weight: float = Field(default=0.25, gt=0.0)
    """Factor of the loss in the objective of training."""
    detach: Literal["none", "embedding", "encoder_output"] = "encoder_output"
    """The side that gets no gradient."""
    embedding_norm: Literal["none", "embedding", "average"] = "average"
    """LayerNorm on the embedded tokens before their running mean, or on the mean."""
    output_norm: bool = True
    """LayerNorm on the encoder's output."""
    affine: bool = False
    """Gains and biases in both norms: as published, and the loss can then be lowered by shrinking them."""


class ParallelEncoderDecoderConfig(TwoStreamConfig, frozen=True):
    """Two causal streams over the same tokens, by default side by side."""

    traits: ClassVar = Traits(
        objectives=("causal", "prefix", "pairs", "conversations"),
        because="predicts each token from those before it",
        sites=("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"),
        cached=True,
        documents_apart=True,
        shared=True,
        recurrent=True,
        default_sites=("enc_ff", "dec_ff"),
    )

    architecture: Literal["parallel_encoder_decoder"] = "parallel_encoder_decoder"
    topology: Literal["parallel", "serial"] = "parallel"
    """The decoder beside the encoder, both from the embedded tokens; or behind all of it, from its output."""
    cross_source: Literal["layer_output", "layer_input"] = "layer_output"
    """What decoder layer l reads of encoder layer l; `layer_input` leaves the last encoder layer out."""
    add_next_position: bool = False
    """The decoder starts from its input plus the position vector of the token to predict."""
    subtract_next_position: Literal["none", "plain", "layer_norm"] = "none"
    """Take that vector off the output after the final norm, before the head; `layer_norm`: and normalise once more."""
    decoder_input_norm: bool = False
    """LayerNorm before W_dec."""
    decoder_input_std: float | None = Field(default=None, gt=0.0)
    """Standard deviation of W_dec at the start; width^-0.5 unless given (0.02 starves the decoder)."""
    encoder_loss: EncoderLossConfig = EncoderLossConfig()

    @property
    def num_encoder_layers(self) -> int:
        """One less where nothing reads the last."""
        return self.layers - (self.cross_source == "layer_input")

    @property
    def uses_next_position(self) -> bool:
        """The position vector of the token to predict is used, so the table has a row more."""
        return self.add_next_position or self.subtract_next_position != "none"

    def why_not_shared(self, ranks: int) -> str:
        """What keeps so many ranks from sharing a sequence (`engine.sequence_parallel`); empty where nothing does."""
        if self.encoder_loss.kind != "none":
            return "model.encoder_loss compares with a running mean over whole rows, of which a rank holds a part"
        return super().why_not_shared(ranks)

    def masks_at(self, site: Site) -> int:
        """How many layers have a site."""
        return self.num_encoder_layers if site in ("enc_ff", "enc_sa") else super().masks_at(site)

    def costs(self, shape: Shape) -> Costs:
        """L encoder and L decoder layers over the same tokens, and the map from the embedded tokens to the decoder."""
        tokens, layers = shape.inputs, self.num_encoder_layers
        sites: tuple[Site, Site] = ("enc_sa", "enc_ff")
        encoder = [(n, one_stream(of, tokens, sites, stream="encoder")) for n, of in shape.by_pattern(layers)]
        decoder = [(n, cross_layer(of, tokens, tokens)) for n, of in shape.by_pattern(self.layers)]
        outside = [*embedded(shape, tokens), linear(shape, "decoder input", tokens)]
        if self.decoder_input_norm:
            outside += [norm(shape, tokens, inputs=False), Part(saved=shape.vectors(tokens))]
        if self.subtract_next_position == "layer_norm":
            outside.append(norm(shape, tokens))
        outside += [*self._encoder_loss(shape), *end(shape), *head(shape)]
        between = last_output(shape, tokens) * (self.recurrence.steps if self.recurrence.marks else 1)
        kept_by_norm = not self.recurrence.marks and (shape.norm_keeps_input or shape.post or self.decoder_input_norm)
        if not kept_by_norm and (shape.norm_keeps_input or not self.decoder_input_norm):
            # Where the first layer's norm does not keep the embedded tokens, the way to the decoder does.
            between = [*between, Part(saved=shape.vectors(tokens))]
        outside += recurrence(shape, tokens, streams=2)
        last = 1 + (self.recurrence.steps if self.recurrence.marks else 0)
        kept = (layers * self.recurrence.steps + last + self.depth) * shape.vectors(tokens)
        return Costs(outside, [*repeated(self, [*encoder, *decoder]), (1, between)], kept)

    def build(self) -> "ParallelEncoderDecoder":
        """The layers."""
        from model.architectures.parallel_encoder_decoder.model import ParallelEncoderDecoder

        return ParallelEncoderDecoder(self)

    def _encoder_loss(self, shape: Shape) -> list[Part]:
        """Its two sides in fp32 and their norms, about."""
        loss = self.encoder_loss
        if loss.kind == "none":
            return []
        norms = (loss.embedding_norm != "none") + loss.output_norm
        saved = 2 * shape.vectors(shape.inputs, 4)
        saved += shape.vectors(shape.inputs) if loss.embedding_norm == "average" else 0
        return [Part("encoder loss", norms * 2 * self.width if loss.affine else 0, saved=saved)]

    @model_validator(mode="after")
    def _streams_fit_together(self) -> "ParallelEncoderDecoderConfig":
        if self.cross_source == "layer_input":
            if self.topology == "serial":
                raise ValueError("cross_source=layer_input: with topology=serial every layer reads the whole encoder")
            if self.layers < 2:
                raise ValueError("cross_source=layer_input leaves the last encoder layer out, so it needs layers >= 2")
        if self.recurrence.steps > 1 and (self.topology == "serial" or self.cross_source == "layer_input"):
            key = "topology=serial" if self.topology == "serial" else "cross_source=layer_input"
            raise ValueError(
                f"recurrence.steps={self.recurrence.steps} leads both streams through their layers side by side, and "
                f"{key} has the {'encoder done first' if self.topology == 'serial' else 'last encoder layer left out'}"
            )
        if self.positions == "rotary" and self.uses_next_position:
            raise ValueError(
                "add_next_position and subtract_next_position need position vectors, which positions=rotary has not"
            )
        return self
