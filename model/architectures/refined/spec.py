"""Configuration and costs of the refined encoder-decoder. Free of torch."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from data_pipeline import may_change
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
    loss_bytes,
    norm_weights,
    one_stream,
)

if TYPE_CHECKING:
    from model.architectures.refined.model import Refined


class RefineConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """How the encoder's vectors are refined, and what the decoder reads of them (docs/model.md E5)."""

    steps: Annotated[int, may_change.THOUGHT] = Field(default=4, ge=0, le=1000)
    """K, how often the step is taken, each time with the same weights. 0 is a plain encoder-decoder without a step."""
    form: Literal["chunked", "prefix"] = "chunked"
    """What the decoder reads: the chunks that are finished, so that every token of a text is learned from; or a prefix,
    which is read whole and never again."""
    chunk: int = Field(default=64, ge=1)
    """For `chunked`: tokens of a chunk, within which the encoder sees both ways."""
    step_loss: float = Field(default=0.3, ge=0.0)
    """Weight of the loss of the same labels read from an earlier step, in training: of each sample another, drawn
    evenly. 0 supervises the last step alone."""
    reweight: bool = False
    """After each layer, vectors move towards those that are like them."""
    temperature: float = Field(default=0.1, gt=0.0)
    """For `reweight`: divides the cosines."""
    gradient: bool = False
    """After each layer, vectors take a step down the gradient of their own token's cross entropy."""


class RefinedConfig(TwoStreamConfig, frozen=True):
    """An encoder whose vectors are refined in repeated steps, and a causal decoder that reads what is finished."""

    traits: ClassVar = Traits(
        objectives=("causal", "prefix", "pairs"),
        because="reads what is finished of a text, and predicts each token behind it",
        sites=("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"),
        documents_apart=True,
        default_sites=("enc_ff", "dec_ff"),
        decodings=("refining",),
        lacks="has an encoder that sees both ways",
    )

    architecture: Literal["refined"] = "refined"
    refine: RefineConfig = RefineConfig()

    @property
    def chunk(self) -> int:
        """Tokens of a chunk; 0 where a prefix is read."""
        return self.refine.chunk if self.refine.form == "chunked" else 0

    @property
    def reads_prompt(self) -> bool:
        """A prefix is read apart from the stream that predicts."""
        return not self.chunk

    @property
    def crosses_aligned(self) -> bool:
        """The null memory has no place."""
        return False

    @property
    def most_keys(self) -> int:
        """The null memory stands before the others."""
        return self.context + 1

    @property
    def sees_in_blocks(self) -> bool:
        """Chunks and prefixes are masks."""
        return False

    @property
    def why_not_partitioned(self) -> str:
        """What keeps parameters from being divided over ranks (ZeRO 3); empty where nothing does."""
        if not self.refine.gradient:
            return ""
        return (
            "model.refine.gradient reads the whole token table in each step, outside the module that has it, and ZeRO "
            "3 has divided it by then; take stage 2, or leave the gradient out"
        )

    def check_objective(self, objective: str) -> None:
        """Raises ValueError unless the architecture can learn from it, and in this form."""
        super().check_objective(objective)
        wanted = ("causal",) if self.chunk else ("prefix", "pairs")
        if objective not in wanted:
            why = "reads chunks, and every token is a label" if self.chunk else "reads a prefix, and needs one"
            other = "prefix" if self.chunk else "chunked"
            raise ValueError(
                f"data.objective={objective} does not fit model.refine.form={self.refine.form}, which {why}; take "
                f"data.objective={' or '.join(wanted)}, or model.refine.form={other}"
            )

    def masks_at(self, site: Site) -> int:
        """How many layers have a site; the step counts as one more of the encoder's."""
        return super().masks_at(site) + (site in ("enc_ff", "enc_sa") and self.refine.steps > 0)

    def costs(self, shape: Shape) -> Costs:
        """L encoder layers, K steps, L decoder layers; in training decoder and head once more, for an earlier step."""
        tokens, steps, read = shape.inputs, self.refine.steps, replace(shape, dense_mask=True)
        sites: tuple[Site, Site] = ("enc_sa", "enc_ff")
        each = read.by_pattern(self.layers)
        layers = [(n, one_stream(of, tokens, sites, stream="encoder")) for n, of in each]
        crossing = [(n, replace(of, dense_mask=self.document_mask)) for n, of in each]
        decoder = [(n, cross_layer(of, tokens, 1 + tokens, aligned=False)) for n, of in crossing]
        behind = replace(read, layer=self.layers)
        step = [*one_stream(behind, tokens, sites, stream="refinement"), *self._mixing(shape)]
        layers += [*decoder, (1, last_output(shape, tokens))]
        if steps:
            layers += [(1, step), (steps - 1, [part._replace(parameters=0) for part in step])]
        outside = [*embedded(shape, tokens), Part("null memory", self.width), *end(shape), *head(shape)]
        again = steps > 1 and self.refine.step_loss > 0
        if again:
            layers += [(n, [_again(part) for part in parts]) for n, parts in decoder]
            outside += [_again(part) for part in (*end(shape), *head(shape))]
            outside.append(Part(saved=loss_bytes(shape)[0]))
        handed_on = 1 + self.layers * (3 if again else 2) + steps
        return Costs(outside, layers, handed_on * shape.vectors(tokens))

    def build(self) -> "Refined":
        """The layers."""
        from model.architectures.refined.model import Refined

        return Refined(self)

    def _mixing(self, shape: Shape) -> list[Part]:
        """Re-weighting and gradient step, about."""
        tokens, width, parts = shape.inputs, self.width, list[Part]()
        if self.refine.reweight:
            weights = norm_weights(self) + (2 * width + 1) * width + 2
            flops = tokens * 4 * width**2 + 4 * tokens**2 * width
            saved = shape.rows * tokens**2 * (3 * 4 + shape.size) + 8 * shape.vectors(tokens)
            parts.append(Part("refinement: re-weighting", weights, flops, saved))
        if self.refine.gradient:
            assert self.vocab_size is not None
            flops = tokens * 4 * self.vocab_size * width
            saved = shape.vectors(tokens)
            parts.append(Part("refinement: gradient step", 1, flops, saved, forward_only=flops))
        return parts

    @model_validator(mode="after")
    def _refinement_is_possible(self) -> "RefinedConfig":
        refine, default = self.refine, RefineConfig()
        if self.chunk >= self.context:
            raise ValueError(
                f"refine.chunk={refine.chunk}: the decoder reads finished chunks, and none is before a text of "
                f"context={self.context} tokens ends; take fewer, such as {max(1, self.context // 4)}"
            )
        if not self.chunk and refine.chunk != default.chunk:
            raise ValueError(f"refine.chunk={refine.chunk} is for refine.form=chunked; leave it out, or take that form")
        if not refine.reweight and refine.temperature != default.temperature:
            raise ValueError(f"refine.temperature={refine.temperature:g} is for refine.reweight=true; leave it out")
        if not refine.steps and (refine.reweight or refine.gradient):
            raise ValueError("refine.steps=0 takes no step, so refine.reweight and refine.gradient mean nothing")
        if self.pattern.kind != "full":
            raise ValueError(
                f"pattern.kind={self.pattern.kind}: the decoder reads whole chunks or a whole prefix, whatever their "
                "distance, and the encoder makes them of all of it; leave pattern out"
            )
        return self


def _again(part: Part) -> Part:
    """The same for the loss of an earlier step."""
    return part._replace(name="earlier step" if part.name else "", parameters=0)
