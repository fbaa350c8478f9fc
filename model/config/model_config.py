"""Configuration that every architecture has. Free of torch: login nodes read this.

Each architecture has a class of its own, which adds what is its own (`model/architectures/NAME/spec.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from model.config.head_config import HeadConfig
from model.config.mask_config import Site
from model.config.pattern_config import FULL, Patterns

_SMALLEST_IN_BLOCKS = 16
"""Channels of a head that FlexAttention's kernels need at least."""
NO_VOCABULARY = "model.vocab_size is not set: take it from the dataset's tokenizer, or give it"


@dataclass(frozen=True)
class Traits:
    """What the rest of the house has to know of an architecture."""

    objectives: tuple[str, ...]
    """What it can learn from, as `data.objective` names it."""
    because: str
    """Why from these; completes "…, which"."""
    sites: tuple[Site, ...] = ()
    """Where masks can stand."""
    default_sites: tuple[Site, ...] = ()
    """Where they stand unless told."""
    causal: bool = True
    """Each token is predicted from those before it, so the model can continue a text and has bits per byte."""
    why_not_continued: str = ""
    """Why it cannot continue a text; for one that is not causal."""
    decodings: tuple[str, ...] = ("autoregressive",)
    """How it can make text, as `DECODINGS` (model/generation/decoding.py) names them, the usual one first; for one that
    is causal. One that writes targets does as `WAYS` (model/generation/drafting.py) says."""
    cached: bool = False
    """All that looks back is attention of ours, whose keys and values are kept (model/attention/cache.py), so that each
    token of a text is read once; else the whole text is, for each new token."""
    documents_apart: bool = False
    """It can keep the documents in a row apart (`document_mask`)."""
    shared: bool = False
    """Positions know of each other by attention of ours alone, so that ranks can share a row: each holds some of its
    positions (`engine.sequence_parallel`)."""
    recurrent: bool = False
    """Its layers can be applied several times (`recurrence`)."""
    in_turn: bool = False
    """It reads the tokens of a text one after the other in training, too, and so keeps no device busy."""
    two_sequences: bool = False
    """It reads one sequence and writes another."""
    writes_targets: bool = False
    """It writes the target of a source, or what comes behind a text; for one of two sequences."""
    lacks: str = "has nothing that this key could change"
    """Why keys of other architectures mean nothing here."""


class ModelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What every architecture has: tables, sizes, norms and loss."""

    # A class of an architecture also has `build() -> Backbone` (model/architectures/backbone.py) and `costs(shape) ->
    # Costs` (model/costs/parts.py), whose types stand in rooms above this one. Without `costs` they are measured.

    traits: ClassVar[Traits]

    architecture: str
    """Which one: it decides what other keys there are. `FILE.py:NAME`, or what an installed package calls its own: see
    [your-architecture.md](your-architecture.md)."""
    layers: int = Field(default=3, ge=1)
    """Layers of each stream."""
    width: int = Field(default=128, ge=1)
    """C, the size of the residual stream."""
    context: int = Field(default=256, ge=2)
    """N, the tokens a sample holds and the length of the position table."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Taken from the dataset's tokenizer unless given."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    norm: Literal["layernorm", "rmsnorm", "batchnorm"] = "layernorm"
    """Of the residual stream. `batchnorm` is for encoders that see both ways; a decoder behind one has `layernorm`."""
    norm_position: Literal["pre", "post"] = "pre"
    """On the input of each sublayer, or on the stream after each addition."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """A table, or sines of the position, added to the tokens; or a rotation of queries and keys in every attention
    (but not from one sequence to another)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Ordinary dropout on the embedded tokens and on each update of the stream; off in evaluation."""
    document_mask: bool = False
    """No attention leaves its document, and positions count from its start, as if each document came alone."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each label's weight that is spread over the whole vocabulary, in training."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the mean of log² Z, Z the sum over exp(logits), in training; PaLM took 1e-4."""

    @property
    def causal(self) -> bool:
        """See `Traits.causal`."""
        return self.traits.causal

    @property
    def depth(self) -> int:
        """Layers that a stream passes, each counted as often as it is passed."""
        return self.layers

    @property
    def dropout_sites(self) -> tuple[Site, ...]:
        """Sites of learned dropout; none when it is off."""
        return ()

    @property
    def l0_sites(self) -> tuple[Site, ...]:
        """Sites of hard-concrete gates; none when they are off."""
        return ()

    @property
    def why_not_compiled(self) -> str:
        """What keeps layers from being compiled; empty where nothing does."""
        return ""

    @property
    def why_not_partitioned(self) -> str:
        """What keeps parameters from being divided over ranks (ZeRO 3); empty where nothing does."""
        return ""

    def why_not_shared(self, ranks: int) -> str:
        """What keeps so many ranks from sharing a sequence (`engine.sequence_parallel`); empty where nothing does."""
        others = "decoder_only, encoder_only and parallel_encoder_decoder can share theirs"
        if self.traits.two_sequences:
            return f"{self.architecture} reads one sequence and writes another, each of its own length; {others}"
        if not self.traits.shared or "traits" not in vars(type(self)):  # another's are about another model
            return f"in {self.architecture} not only attention joins the positions of a text; {others}"
        if self.norm == "batchnorm":
            return "norm=batchnorm takes its statistics over whole rows, of which a rank holds a part"
        if self.context % ranks:
            return f"it does not divide model.context={self.context}"
        return ""

    @property
    def reads_prompt(self) -> bool:
        """A prefix is read apart from the stream that predicts, which stays causal; so a prompt may be one."""
        return False

    @property
    def needs_weights(self) -> bool:
        """Attention weights are formed, in training at least."""
        return False

    @property
    def patterns(self) -> tuple[Patterns, ...]:
        """The different ones that layers have, in the order in which they come."""
        return ((FULL,),)

    @property
    def smallest_head(self) -> int:
        """Channels of the smallest head of attention; C where there is none."""
        return self.width

    @property
    def sees_in_blocks(self) -> bool:
        """On CUDA, what documents or a prefix let be seen goes to FlexAttention in blocks, not as a dense mask."""
        return not (self.traits.two_sequences or self.needs_weights) and self.smallest_head >= _SMALLEST_IN_BLOCKS

    @property
    def uses_next_position(self) -> bool:
        """The position vector of the token to predict is used, so the table has a row more."""
        return False

    @property
    def label_head(self) -> HeadConfig | None:
        """What it says of a text, where these are labels; None where it predicts tokens."""
        return None

    @property
    def target_span(self) -> int:
        """Neighbours that are predicted together, at most."""
        return 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that a sample of N holds for the first stream, and labels."""
        return self.context, self.context

    def masks_at(self, site: Site) -> int:
        """How many layers have a site."""
        return 1 if site == "embed" else self.layers

    def num_masks(self, sites: tuple[Site, ...]) -> int:
        """One in each layer that has the site."""
        return sum(map(self.masks_at, sites))

    def check_objective(self, objective: str) -> None:
        """Raises ValueError unless the architecture can learn from it."""
        fitting = self.traits.objectives
        if objective not in fitting:
            raise ValueError(
                f"data.objective={objective} does not fit model.architecture={self.architecture}, which "
                f"{self.traits.because}; take data.objective={' or '.join(fitting)}"
            )

    @model_validator(mode="after")
    def _batch_statistics_see_both_ways(self) -> "ModelConfig":
        if self.norm == "batchnorm" and self.causal:
            raise ValueError(
                "norm=batchnorm takes its statistics over all positions, so a causal model would see the tokens it is "
                "to predict; it fits bidirectional encoders only: take layernorm or rmsnorm"
            )
        return self

    @model_validator(mode="after")
    def _documents_can_be_kept_apart(self) -> "ModelConfig":
        if self.document_mask and not self.traits.documents_apart:
            raise ValueError(f"document_mask: {self.architecture} {self.traits.lacks}; leave it out")
        return self
