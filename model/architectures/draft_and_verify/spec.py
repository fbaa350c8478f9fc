"""Configuration and costs of one encoder with a decoder that drafts and one that verifies. Free of torch."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import L0Config, LearnedDropoutConfig, Site
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
    linear_weights,
    loss_bytes,
    norm_weights,
    one_stream,
)

if TYPE_CHECKING:
    from model.architectures.backbone import Backbone
    from model.architectures.draft_and_verify.model import DraftAndVerify
    from model.architectures.draft_and_verify.two_decoders import TwoDecoders

_DRAFTED: tuple[Site, ...] = ("draft_ff", "draft_sa", "draft_cross")
_CHUNK = 32
_EXPECTED_SHARE = {"nat": 1.0, "cmlm": 0.5, "mixed": 0.5, "glat": 1.0}


class DraftConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The decoder that writes all places at once, from those of them that are shown to it (docs/model.md)."""

    masking: Literal["nat", "cmlm", "glat", "mixed"] = "mixed"
    """What is hidden of a target in training: all of it (`nat`); any number of places, anywhere (`cmlm`); the same of
    every other target, and of the others a suffix (`mixed`); all but as many places, anywhere, as a share of those that
    a first pass got wrong (`glat`)."""
    share: bool = False
    """One stack for both decoders, which differ by what they see and by a learned vector."""
    layers: int | None = Field(default=None, ge=1)
    """Layers of the decoder that drafts; 1 unless given, and as many as the other's where they are shared."""
    refine: bool = False
    """The other decoder reads the draft's vectors beside the encoder's; its text is then another than without them."""
    weight: float = Field(default=1.0, ge=0.0)
    """Of the draft's loss beside the other decoder's."""
    length_weight: float = Field(default=0.1, ge=0.0)
    """Of the loss of the target's length."""
    chunk: int | None = Field(default=None, ge=1)
    """Tokens that `data.objective=continuation` writes at a time; 32 unless given, or half of a shorter context."""
    glat_start: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the wrong places whose number `glat` shows at the first step."""
    glat_end: float = Field(default=0.3, ge=0.0, le=1.0)
    """The same from step `glat_steps` on."""
    glat_steps: int = Field(default=10_000, ge=1)
    """Steps on which the share goes from the one to the other."""


class DraftAndVerifyConfig(TwoStreamConfig, frozen=True):
    """An encoder, a decoder that drafts all of the target at once, and one that writes it token by token."""

    traits: ClassVar = Traits(
        objectives=("pairs", "continuation"),
        because="reads one text and writes another",
        sites=("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed", *_DRAFTED),
        default_sites=("enc_ff", "dec_ff", "draft_ff"),
        causal=False,
        decodings=("verify", "ar", "nar", "mask_predict", "refine"),
        two_sequences=True,
        writes_targets=True,
        lacks="reads one sequence and writes another",
    )

    architecture: Literal["draft_and_verify"] = "draft_and_verify"
    draft: DraftConfig = DraftConfig()

    @property
    def num_draft_layers(self) -> int:
        """Layers that a draft goes through."""
        return self.draft.layers or (self.layers if self.draft.share else 1)

    @property
    def chunk(self) -> int:
        """Tokens that `continuation` writes at a time."""
        return self.draft.chunk or min(_CHUNK, self.context // 2)

    @property
    def expected_share(self) -> float:
        """Of a target's places that are hidden in training, about; of `glat` when all is wrong, 1 less the share."""
        return _EXPECTED_SHARE[self.draft.masking]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens read and written of a window of N, under `continuation`."""
        return self.context, self.chunk

    def masks_at(self, site: Site) -> int:
        """How many layers have a site; source, target and draft are embedded."""
        if site in _DRAFTED:
            return 0 if self.draft.share else self.num_draft_layers
        return 3 if site == "embed" else self.layers

    def costs(self, shape: Shape) -> Costs:
        """L encoder layers over the inputs, the layers of both decoders over the targets; the head reads them twice.

        The first pass of `glat` is a draft and its head once more, without gradients.
        """
        inputs, targets = shape.inputs, shape.targets
        each = shape.by_pattern(self.layers)
        read = inputs + targets * self.draft.refine
        encoder = [(n, one_stream(of, inputs, ("enc_sa", "enc_ff"), stream="encoder")) for n, of in each]
        decoder = [(n, cross_layer(of, targets, read, aligned=False)) for n, of in each]
        drafter = [(n, self._drafting_layer(of)) for n, of in shape.by_pattern(self.num_draft_layers)]
        written = [*embedded(shape, targets, causal=True, again=True), *embedded(shape, targets, again=True)]
        outside = [*embedded(shape, inputs), *written, *end(shape), *head(shape), *self._drafting(shape)]
        kept = (self.layers + 1) * shape.vectors(inputs) + (self.layers + self.num_draft_layers) * shape.vectors(
            targets
        )
        if self.draft.refine:
            outside += last_output(shape, read)
        if self.draft.masking == "glat":
            outside += _again([*embedded(shape, targets, again=True), *head(shape)])
            drafter += [(n, _again(parts)) for n, parts in drafter]
        return Costs(outside, [*encoder, *decoder, *drafter, (1, last_output(shape, inputs))], kept)

    def _drafting(self, shape: Shape) -> list[Part]:
        """Beside the layers: marks of hidden places, the last norm, the head once more, and the length's own."""
        width, longest = self.width, self.context
        in_norm = 1 if self.norm != "rmsnorm" else 2 * 4 // shape.size
        lengths = Part(
            "lengths",
            linear_weights(self, width, longest),
            2 * width * longest,
            saved=(1 + in_norm) * shape.vectors(1) + shape.rows * longest * 4,
        )
        marks = Part("marks", 2 * width, saved=shape.rows * shape.targets * 8)
        unmarked = self.shares_mask_source and "embed" not in self.dropout_sites and not self.dropout
        if unmarked and (shape.norm_keeps_input or shape.post):  # else it is kept as that of other streams is
            marks = marks._replace(saved=marks.saved + shape.vectors(shape.targets))
        [table] = head(shape)
        again = Part(table.name, 0, table.flops, saved=loss_bytes(shape)[0])
        return [marks, lengths, Part("norms", norm_weights(self)), *end(shape), again]

    def _drafting_layer(self, shape: Shape) -> list[Part]:
        layer = partial(cross_layer, shape, shape.targets, shape.inputs, aligned=False, causal=False)
        if self.draft.share:  # parameters were counted, and parts have the names of their modules
            return [part._replace(parameters=0) for part in layer()]
        return layer(stream="draft", sites=("draft_sa", "draft_cross", "draft_ff"))

    def build(self) -> "DraftAndVerify":
        """The layers."""
        from model.architectures.draft_and_verify.model import DraftAndVerify

        return DraftAndVerify(self)

    def assemble(self, backbone: "Callable[[], Backbone]") -> "TwoDecoders":
        """The model around them."""
        from model.architectures.draft_and_verify.two_decoders import TwoDecoders

        return TwoDecoders(self, backbone)

    def _sites_of(self, masks: LearnedDropoutConfig | L0Config) -> tuple[Site, ...]:
        sites = super()._sites_of(masks)
        return sites if masks.sites or not self.draft.share else tuple(s for s in sites if s not in _DRAFTED)

    @model_validator(mode="after")
    def _the_drafts_options_fit(self) -> "DraftAndVerifyConfig":
        draft = self.draft
        if draft.refine and draft.masking != "nat":
            raise ValueError(
                f"draft.refine=true has the decoder that is to predict a target read the draft's vectors, and "
                f"draft.masking={draft.masking} shows parts of that target to the draft; take draft.masking=nat"
            )
        if draft.share and draft.layers not in (None, self.layers):
            raise ValueError(
                f"draft.share=true has one stack for both decoders, of layers={self.layers}; leave draft.layers out"
            )
        if draft.share and self.block_gates.kind != "none":
            raise ValueError(
                "draft.share=true runs each layer of the decoders twice in a step, and block_gates keep the density of "
                "a layer over one pass; set draft.share=false, or leave block_gates out"
            )
        named = [site for masks in (self.learned_dropout, self.l0) for site in masks.sites or ()]
        if draft.share and (own := [site for site in named if site in _DRAFTED]):
            raise ValueError(
                f"draft.share=true has no stack of its own for drafts, and so no site {own[0]}; name dec_ff"
            )
        if self.pattern.windows and self.num_draft_layers > self.layers:
            raise ValueError(
                f"pattern.windows has a width for each of layers={self.layers}, and draft.layers={draft.layers} are "
                "more: take pattern.window, or fewer layers of the draft"
            )
        if draft.chunk is not None and draft.chunk >= self.context:
            raise ValueError(
                f"draft.chunk={draft.chunk} leaves nothing of a window of context={self.context} tokens to be read; "
                f"take {self.context // 2} or less"
            )
        return self


def _again(parts: list[Part]) -> list[Part]:
    """The same parts in a pass more, that no gradient goes through."""
    return [part._replace(parameters=0, saved=0, forward_only=part.flops) for part in parts]
