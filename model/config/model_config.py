"""What a model can be told. Free of torch: login nodes read this."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import L0Config, LearnedDropoutConfig, Site

Architecture = Literal["parallel_encoder_decoder", "decoder_only", "encoder_decoder", "encoder_only"]
Objective = Literal["causal", "prefix", "masked", "span_corruption", "pairs"]
"""What is made of the text for a model to learn from, as `data.objective` names it."""

SITES: dict[Architecture, tuple[Site, ...]] = {
    "parallel_encoder_decoder": ("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"),
    "decoder_only": ("dec_ff", "dec_sa", "embed"),
    "encoder_decoder": ("enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"),
    "encoder_only": ("enc_ff", "enc_sa", "embed"),
}
"""Where masks can stand in each architecture."""
DEFAULT_SITES: dict[Architecture, tuple[Site, ...]] = {
    "parallel_encoder_decoder": ("enc_ff", "dec_ff"),
    "decoder_only": ("dec_ff",),
    "encoder_decoder": ("enc_ff", "dec_ff"),
    "encoder_only": ("enc_ff",),
}

_SIDE_BY_SIDE = (
    "topology",
    "streams",
    "cross_source",
    "add_next_position",
    "subtract_next_position",
    "decoder_input_norm",
    "decoder_input_std",
    "encoder_loss",
)
"""Keys that mean nothing unless two streams read the same tokens."""
_SECOND_STREAM = (*_SIDE_BY_SIDE, "cross_heads", "decoder_order", "decoder_residual_writes")
"""Keys that mean nothing without a second stream."""

_WITHOUT: dict[Architecture, tuple[tuple[str, ...], str]] = {
    "parallel_encoder_decoder": ((), ""),
    "decoder_only": (_SECOND_STREAM, "has no second stream"),
    "encoder_decoder": ((*_SIDE_BY_SIDE, "document_mask"), "reads one sequence and writes another"),
    "encoder_only": (_SECOND_STREAM, "has no second stream"),
}
"""Keys that an architecture cannot use, and why."""

_FITS: dict[Architecture, tuple[tuple[Objective, ...], str]] = {
    "parallel_encoder_decoder": (("causal", "prefix", "pairs"), "predicts each token from those before it"),
    "decoder_only": (("causal", "prefix", "pairs"), "predicts each token from those before it"),
    "encoder_decoder": (("span_corruption", "pairs"), "reads one text and writes another, such as what is missing"),
    "encoder_only": (("masked",), "sees every token, the next one included, so some have to be hidden from it"),
}
"""What an architecture can learn from, and why."""

NO_VOCABULARY = "model.vocab_size is not set: take it from the dataset's tokenizer, or give it"


class EncoderLossConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
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


class ModelConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False):
    """One of the architectures, its shape and its parts."""

    architecture: Architecture = "parallel_encoder_decoder"
    """Two causal streams; the plain baseline; an encoder of one sequence and a decoder of another, as T5; an encoder,
    as BERT. The last two go with another `data.objective`."""
    topology: Literal["parallel", "serial"] = "parallel"
    """The decoder beside the encoder, both from the embedded tokens; or behind all of it, from its output."""
    streams: Literal["plain", "batched"] = "plain"
    """One layer after the other; or a layer of each stream at a time, with one product for both: the same numbers but
    for rounding, the same weights. No faster on a CPU (docs/model.md A13)."""
    layers: int = Field(default=3, ge=1)
    """Layers of each stream."""
    width: int = Field(default=128, ge=1)
    """C, the size of the residual stream."""
    heads: int = Field(default=4, ge=1)
    """Heads of self attention and of the mask attention."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values in self attention, each shared by heads / kv_heads heads of queries (grouped-query
    attention); as many as `heads` unless given. Cross attention groups its heads alike."""
    cross_heads: int | None = Field(default=None, ge=1)
    """Heads of cross attention; twice `heads` unless given."""
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
    ff: Literal["gelu", "swiglu"] = "gelu"
    """C -> F -> C with the exact GELU, or with SiLU of one half times the other."""
    ff_width: int | None = Field(default=None, ge=1)
    """F; unless given, 4 C for `gelu` and 8 C / 3, up to a multiple of 8, for `swiglu`: about as many parameters."""
    attention: Literal["auto", "flash", "explicit"] = "auto"
    """Kernels that never form the T x T weights or an error, plain matrix products, or whatever fits."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Ordinary dropout on the embedded tokens and on each update of the stream; off in evaluation."""
    attention_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Of the attention weights; the rate `dropout` unless given. Needs `explicit` attention."""
    document_mask: bool = False
    """No attention leaves its document, and positions count from its start, as if each document came alone."""
    cross_source: Literal["layer_output", "layer_input"] = "layer_output"
    """What decoder layer l reads of encoder layer l; `layer_input` leaves the last encoder layer out."""
    decoder_order: Literal["self_cross_ff", "cross_self_ff"] = "self_cross_ff"
    """Order within a decoder layer."""
    add_next_position: bool = False
    """The decoder starts from its input plus the position vector of the token to predict."""
    subtract_next_position: Literal["none", "plain", "layer_norm"] = "none"
    """Take that vector off the output after the final norm, before the head; `layer_norm`: and normalise once more."""
    decoder_input_norm: bool = False
    """LayerNorm before W_dec."""
    decoder_input_std: float | None = Field(default=None, gt=0.0)
    """Standard deviation of W_dec at the start; width^-0.5 unless given (0.02 starves the decoder)."""
    decoder_residual_writes: Literal[2, 3] = 2
    """Maps that write to the decoder's stream start at 0.02 / sqrt(this x layers); a decoder layer writes 3 times."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each label's weight that is spread over the whole vocabulary, in training."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the mean of log² Z, Z the sum over exp(logits), in training; PaLM took 1e-4."""
    encoder_loss: EncoderLossConfig = EncoderLossConfig()
    learned_dropout: LearnedDropoutConfig = LearnedDropoutConfig()
    l0: L0Config = L0Config()

    @property
    def num_cross_heads(self) -> int:
        """Heads of cross attention."""
        return self.cross_heads or 2 * self.heads

    @property
    def queries_per_kv_head(self) -> int:
        """Heads of queries that share one of keys and values."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def hidden_width(self) -> int:
        """F of the feed forward."""
        return self.ff_width or (4 * self.width if self.ff == "gelu" else -(-self.width // 3) * 8)

    @property
    def attention_rate(self) -> float:
        """Of dropout on the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def needs_weights(self) -> bool:
        """Attention weights are formed, in training at least."""
        return self.attention == "explicit" or self.attention_rate > 0.0

    @property
    def causal(self) -> bool:
        """Each token is predicted from those before it, so the model can continue a text and has bits per byte."""
        return self.architecture in ("parallel_encoder_decoder", "decoder_only")

    @property
    def num_encoder_layers(self) -> int:
        """0 where there is no encoder."""
        if self.architecture == "decoder_only":
            return 0
        return self.layers - (self.cross_source == "layer_input")

    @property
    def num_decoder_layers(self) -> int:
        """With cross attention; 0 where there is no second stream."""
        return self.layers if self.architecture in ("parallel_encoder_decoder", "encoder_decoder") else 0

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that a sample of N holds for the first stream, and labels.

        Span corruption cuts out 15 % in spans of 3 in the mean; each leaves a token in the input and is headed by it in
        the labels, and an end is added to both (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4).
        """
        if self.architecture != "encoder_decoder":
            return self.context, self.context
        noise = max(round(self.context * 0.15), 1)
        spans = max(round(noise / 3), 1)
        return self.context - noise + spans + 1, noise + spans + 1

    @property
    def dropout_sites(self) -> tuple[Site, ...]:
        """Sites of learned dropout; none when it is off."""
        return self._sites_of(self.learned_dropout)

    @property
    def l0_sites(self) -> tuple[Site, ...]:
        """Sites of hard-concrete gates; none when they are off."""
        return self._sites_of(self.l0)

    def num_masks(self, sites: tuple[Site, ...]) -> int:
        """One in each layer that has the site."""
        embed = 2 if self.architecture == "encoder_decoder" else 1
        per_site = {"embed": embed, "enc_ff": self.num_encoder_layers, "enc_sa": self.num_encoder_layers}
        return sum(per_site.get(site, self.layers) for site in sites)

    def check_objective(self, objective: Objective) -> None:
        """Raises ValueError unless the architecture can learn from it."""
        fitting, reason = _FITS[self.architecture]
        if objective not in fitting:
            raise ValueError(
                f"data.objective={objective} does not fit model.architecture={self.architecture}, which {reason}; "
                f"take data.objective={' or '.join(fitting)}"
            )

    def _sites_of(self, masks: LearnedDropoutConfig | L0Config) -> tuple[Site, ...]:
        return tuple(masks.sites or DEFAULT_SITES[self.architecture]) if masks.enabled else ()

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        heads = {"heads": self.heads}
        if self.num_decoder_layers:
            heads["cross_heads"] = self.num_cross_heads
        for key, count in heads.items():
            if self.width % count:
                raise ValueError(f"{key}={count} does not divide width={self.width}")
            if self.positions == "rotary" and self.width // count % 2:
                raise ValueError(
                    f"positions=rotary turns pairs of channels, but width={self.width} over {key}={count} is "
                    f"{self.width // count} channels a head; take an even number"
                )
        if self.kv_heads is not None:
            if self.heads % self.kv_heads:
                raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
            if (cross := heads.get("cross_heads", 0)) % self.queries_per_kv_head:
                raise ValueError(
                    f"kv_heads={self.kv_heads} shares keys among {self.queries_per_kv_head} heads, which do not divide "
                    f"cross_heads={cross}"
                )
        return self

    @model_validator(mode="after")
    def _architecture_has_it(self) -> "ModelConfig":
        valid = SITES[self.architecture]
        for key, sites in (("learned_dropout", self.learned_dropout.sites), ("l0", self.l0.sites)):
            for site in sites or ():
                if site not in valid:
                    raise ValueError(f"{key}.sites: {self.architecture} has no site {site}; it has {', '.join(valid)}")
            if len(set(sites or ())) < len(sites or ()):
                raise ValueError(f"{key}.sites: a site is named twice in {', '.join(sites or ())}")
        keys, reason = _WITHOUT[self.architecture]
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {self.architecture} {reason}; leave it out")
        if max(self.lengths) > self.context:
            raise ValueError(
                f"context={self.context}: of so few tokens span corruption makes {self.lengths[0]}; take 10 or more"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> "ModelConfig":
        if self.norm == "batchnorm" and self.causal:
            raise ValueError(
                "norm=batchnorm takes its statistics over all positions, so a causal model would see the tokens it is "
                "to predict; it fits bidirectional encoders only: take layernorm or rmsnorm"
            )
        if self.norm == "batchnorm" and self.document_mask:
            raise ValueError(
                "norm=batchnorm takes its statistics over all documents of a micro-batch, and with document_mask none "
                "may know of another: take layernorm or rmsnorm, or leave document_mask out"
            )
        if self.attention == "flash" and self.attention_rate:
            raise ValueError(
                f"attention=flash never forms the attention weights, so it cannot drop them at rate "
                f"{self.attention_rate}; set attention_dropout=0, or attention=explicit"
            )
        if self.streams == "batched":
            if self.topology == "serial":
                raise ValueError("streams=batched: with topology=serial the decoder begins where the encoder ends")
            if self.layers < 2:
                raise ValueError("streams=batched: with layers=1 no two layers are independent; take plain")
        if self.cross_source == "layer_input":
            if self.topology == "serial":
                raise ValueError("cross_source=layer_input: with topology=serial every layer reads the whole encoder")
            if self.layers < 2:
                raise ValueError("cross_source=layer_input leaves the last encoder layer out, so it needs layers >= 2")
        if self.positions == "rotary" and (self.add_next_position or self.subtract_next_position != "none"):
            raise ValueError(
                "add_next_position and subtract_next_position need position vectors, which positions=rotary has not"
            )
        if self.l0.enabled and self.learned_dropout.enabled:
            raise ValueError("l0 and learned_dropout are both enabled; set learned_dropout.enabled=false, or l0's")
        if self.learned_dropout.detach_embed and self.learned_dropout.source != "embed":
            raise ValueError("learned_dropout.detach_embed is about source=embed; leave it out")
        return self
