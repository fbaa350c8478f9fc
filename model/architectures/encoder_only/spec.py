"""Configuration and costs of an encoder-only model. Free of torch."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from data_pipeline.errors import ConfigError
from model.config.head_config import NO_LABELS, HeadConfig
from model.config.model_config import Traits
from model.config.transformer import TransformerConfig
from model.costs.parts import Costs, Part, Shape, embedded, end, head, one_stream
from model.costs.recurrence import recurrence, repeated

if TYPE_CHECKING:
    from model.architectures.backbone import Backbone
    from model.architectures.encoder_only.model import EncoderOnly
    from model.architectures.token_model import TokenModel


class EncoderOnlyConfig(TransformerConfig, frozen=True):
    """An encoder that fills masked places, as BERT."""

    traits: ClassVar = Traits(
        objectives=("masked", "labels"),
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
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _places_have_no_smoothing(self) -> "EncoderOnlyConfig":
        if self.head.kind == "span" and (self.label_smoothing or self.z_loss):
            raise ValueError("label_smoothing and z_loss are over a table of labels, and head.kind=span has none")
        if self.head.labels is not None and self.head.kind in ("none", "span"):
            raise ValueError(f"head.labels are of head.kind=sequence or token, not {self.head.kind}; leave them out")
        return self

    @property
    def label_head(self) -> HeadConfig | None:
        """See `ModelConfig.label_head`."""
        return None if self.head.kind == "none" else self.head

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that are read of a sample, and vectors that the head reads."""
        return self.context, 1 if self.head.kind == "sequence" else self.context

    def why_not_shared(self, ranks: int) -> str:
        """A label of a text is of all its tokens."""
        labels = "labels of texts, or of what is in them, are not told by a part of a text"
        return labels if self.label_head else super().why_not_shared(ranks)

    def check_objective(self, objective: str) -> None:
        """Raises ValueError unless it is what the head is for."""
        super().check_objective(objective)
        if (objective == "labels") != (self.label_head is not None):
            raise ValueError(
                f"data.objective={objective} and model.head.kind={self.head.kind} do not fit: labels need a head, "
                "sequence, token or span, and a head needs data.objective=labels"
            )

    def costs(self, shape: Shape) -> Costs:
        """L layers of one stream."""
        layers = [(n, one_stream(of, shape.inputs, ("enc_sa", "enc_ff"))) for n, of in shape.by_pattern(self.layers)]
        whole = replace(shape, targets=shape.inputs)  # which the last norm reads, whatever the head does
        outside = [*embedded(shape, shape.inputs), *recurrence(shape, shape.inputs), *end(whole)]
        outside += head(shape) if self.label_head is None else self._labels(shape)
        return Costs(outside, repeated(self, layers), shape.vectors(shape.inputs) * self.depth)

    def _labels(self, shape: Shape) -> list[Part]:
        """The table of tokens, which is no head, and that of labels with what the mean over a text keeps."""
        table, outputs = head(replace(shape, targets=0)), self.head.outputs
        kept = shape.held(shape.inputs) * (shape.size + 1) if self.head.kind == "sequence" else 0
        return [*table, Part("head", outputs * self.width, shape.targets * 2 * outputs * self.width, kept)]

    def build(self) -> "EncoderOnly":
        """The layers."""
        from model.architectures.encoder_only.model import EncoderOnly

        return EncoderOnly(self)

    def assemble(self, backbone: "Callable[[], Backbone]") -> "TokenModel":
        """Tables first, then the layers, then a head of labels. Raises ConfigError if these are not known yet."""
        from model.architectures.encoder_only.labels import LabelModel
        from model.architectures.token_model import TokenModel

        if self.label_head is None:
            return TokenModel(self, backbone)
        if not self.label_head.outputs:
            raise ConfigError(NO_LABELS)
        return LabelModel(self, backbone, self.label_head)
