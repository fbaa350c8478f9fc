"""Configuration of architectures of attention and feed forward, of one stream and of two. Free of torch."""

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import Field, model_validator

from model.config.gates_config import BlockGatesConfig, GatedSite
from model.config.mask_config import L0Config, LearnedDropoutConfig, Site
from model.config.model_config import ModelConfig
from model.config.pattern_config import PatternConfig, Patterns
from model.config.recurrence_config import RecurrenceConfig
from model.config.scores_config import ScoresConfig
from model.config.weights_config import WeightsConfig

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
"""Of a feed forward."""
_ATTENTIONS: tuple[Site, ...] = ("enc_sa", "dec_sa", "cross", "draft_sa", "draft_cross")


class TransformerConfig(ModelConfig, frozen=True):
    """Layers of self attention and feed forward, with masks on their updates."""

    heads: int = Field(default=4, ge=1)
    """Heads of self attention and of the mask attention."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values in self attention, each shared by heads / kv_heads heads of queries (grouped-query
    attention); as many as `heads` unless given. Cross attention groups its heads alike."""
    ff: Activation = "gelu"
    """C -> F -> C with the exact GELU, with its approximation by tanh, as GPT-2 has it, or with SiLU of one half times
    the other."""
    ff_width: int | None = Field(default=None, ge=1)
    """F; unless given, 4 C for either GELU and 8 C / 3, up to a multiple of 8, for `swiglu`: about as many
    parameters."""
    attention: Literal["auto", "flash", "explicit"] = "auto"
    """Kernels that never form the T x T weights or an error, plain matrix products, or whatever fits."""
    attention_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Of the attention weights; the rate `dropout` unless given. Needs `explicit` attention."""
    pattern: PatternConfig = PatternConfig()
    weights: WeightsConfig = WeightsConfig()
    scores: ScoresConfig = ScoresConfig()
    learned_dropout: LearnedDropoutConfig = LearnedDropoutConfig()
    l0: L0Config = L0Config()
    block_gates: BlockGatesConfig = BlockGatesConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    heads_left: dict[str, int] = Field(default={})
    """Heads of single attentions, such as `dec_sa/00: 3`, from which `duet checkpoint shrink` took others."""
    channels_left: dict[str, int] = Field(default={})
    """Channels that single feed forwards write, such as `dec_ff/00: 96`, from which it took others."""

    @property
    def depth(self) -> int:
        """Layers that a stream passes, each counted as often as it is passed."""
        return self.layers * self.recurrence.steps

    @property
    def heads_by_key(self) -> dict[str, int]:
        """Heads of each attention, by the key that sets them."""
        return {"heads": self.heads}

    @property
    def smallest_head(self) -> int:
        """Channels of the smallest head of attention."""
        return self.width // max(self.heads_by_key.values())

    @property
    def queries_per_kv_head(self) -> int:
        """Heads of queries that share one of keys and values."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def hidden_width(self) -> int:
        """F of the feed forward."""
        return self.ff_width or (-(-self.width // 3) * 8 if self.ff == "swiglu" else 4 * self.width)

    @property
    def attention_rate(self) -> float:
        """Of dropout on the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def most_keys(self) -> int:
        """That a query may see."""
        return self.context

    @property
    def needs_weights(self) -> bool:
        """Attention weights are formed, in training at least."""
        formed = self.weights.kind != "softmax" or self.scores.kind in ("synthesizer", "routing")
        return self.attention == "explicit" or self.attention_rate > 0.0 or formed

    @property
    def score_channels(self) -> tuple[int, int]:
        """Channels that self attention maps a token to, to make scores of it: as a query, and as a key."""
        scores, width, keys = self.scores, self.width, self.width // self.queries_per_kv_head
        if scores.kind == "synthesizer":
            return scores.maps * width, width * ("dot" in scores.parts)
        if scores.kind == "routing":  # queries of routed heads are their keys
            return width, width // self.heads * (self.heads - scores.routed_heads_of(self.heads))
        return width, keys

    @property
    def patterns(self) -> tuple[Patterns, ...]:
        """The different ones that layers have, in the order in which they come."""
        return tuple(dict.fromkeys(self.pattern.of_layer(layer, self.context) for layer in range(self.layers)))

    def pattern_of(self, layer: int) -> int:
        """Which of the `patterns` a layer of each stream has."""
        return self.patterns.index(self.pattern.of_layer(layer, self.context))

    @property
    def shares_mask_source(self) -> bool:
        """All masks come from one attention over the embedded tokens."""
        return bool(self.dropout_sites) and self.learned_dropout.source == "embed"

    @property
    def mask_rank(self) -> int:
        """Of the map that gives the angle with source `low_rank`: a quarter of the width."""
        return max(1, self.width // 4)

    @property
    def dropout_sites(self) -> tuple[Site, ...]:
        """Sites of learned dropout; none when it is off."""
        return self._sites_of(self.learned_dropout)

    @property
    def l0_sites(self) -> tuple[Site, ...]:
        """Sites of hard-concrete gates; none when they are off."""
        return self._sites_of(self.l0)

    @property
    def gate_sites(self) -> tuple[Site, ...]:
        """Feed forwards in gated blocks; none when there are no gates."""
        gates = self.block_gates
        feed_forwards = [site for site in self.traits.default_sites if site in get_args(GatedSite)]
        return () if gates.kind == "none" else tuple(gates.sites or feed_forwards)

    def blocks_at(self, site: Site, layer: int) -> int:
        """Blocks of a gated feed forward; `layer` counts from 0 in its stream."""
        return self.block_gates.left.get(f"{site}/{layer:02d}", self.block_gates.blocks)

    def heads_at(self, site: Site, layer: int) -> int:
        """Heads of queries of an attention; `layer` counts from 0 in its stream."""
        return self.heads_left.get(f"{site}/{layer:02d}", self.heads_of(site))

    def heads_of(self, site: Site) -> int:
        """The same where none was taken out."""
        return self.heads_by_key["cross_heads" if "cross" in site else "heads"]

    @property
    def shrunk(self) -> bool:
        """Layers of a stream are no longer alike."""
        return bool(self.block_gates.left or self.heads_left or self.channels_left)

    @property
    def block_width(self) -> int:
        """Hidden units of a block."""
        return self.hidden_width // self.block_gates.blocks

    @property
    def why_not_compiled(self) -> str:
        """What keeps layers from being compiled; empty where nothing does."""
        if not self.gate_sites or self.block_gates.train_sparse_after is None:
            return ""
        return (
            "model.block_gates.train_sparse_after groups tokens by open block, as many as there happen to be, and "
            "compiled layers need fixed shapes; leave one of them out"
        )

    def why_not_shared(self, ranks: int) -> str:
        """What keeps so many ranks from sharing a sequence (`engine.sequence_parallel`); empty where nothing does."""
        if why := super().why_not_shared(ranks):
            return why
        for key, count in self.heads_by_key.items():
            for heads, what in ((count, ""), (count // self.queries_per_kv_head, " in groups that share keys")):
                if heads % ranks:
                    return f"each rank has some heads in attention, and it does not divide {key}={count}{what}"
        for key, kind, usual in (("weights", self.weights.kind, "softmax"), ("scores", self.scores.kind, "dot")):
            if kind != usual:
                return f"model.{key}.kind={kind} has numbers of each head, of which a rank would have some only"
        if self.attention_rate:
            return "dropout of attention weights draws for all heads; set model.attention_dropout=0"
        if any(len(patterns) > 1 for patterns in self.patterns):
            return "model.pattern.merge=heads gives each half of the heads other keys; take union or alternate"
        return ""

    def _sites_of(self, masks: LearnedDropoutConfig | L0Config) -> tuple[Site, ...]:
        return tuple(masks.sites or self.traits.default_sites) if masks.enabled else ()

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        for key, count in self.heads_by_key.items():
            if self.width % count:
                raise ValueError(f"{key}={count} does not divide width={self.width}")
            if self.positions == "rotary" and self.width // count % 2:
                raise ValueError(
                    f"positions=rotary turns pairs of channels, but width={self.width} over {key}={count} is "
                    f"{self.width // count} channels a head; take an even number"
                )
        if self.kv_heads is None:
            return self
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        for key, count in self.heads_by_key.items():
            if count % self.queries_per_kv_head:
                raise ValueError(
                    f"kv_heads={self.kv_heads} shares keys among {self.queries_per_kv_head} heads, which do not divide "
                    f"{key}={count}"
                )
        return self

    @model_validator(mode="after")
    def _pattern_fits(self) -> "TransformerConfig":
        self.pattern.check(self.layers, self.heads_by_key, self.context)
        self.scores.check(
            heads=self.heads,
            context=self.context,
            causal=self.causal,
            pattern=self.pattern.kind,
            weights=self.weights.kind,
            kv_heads=self.kv_heads is not None,
            rotary=self.positions == "rotary",
            documents=self.document_mask,
        )
        return self

    @model_validator(mode="after")
    def _sites_are_there(self) -> "TransformerConfig":
        valid = self.traits.sites
        named: dict[str, Sequence[Site] | None] = {
            "learned_dropout": self.learned_dropout.sites,
            "l0": self.l0.sites,
            "block_gates": self.block_gates.sites,
        }
        for key, sites in named.items():
            for site in sites or ():
                if site not in valid:
                    raise ValueError(f"{key}.sites: {self.architecture} has no site {site}; it has {', '.join(valid)}")
            if len(set(sites or ())) < len(sites or ()):
                raise ValueError(f"{key}.sites: a site is named twice in {', '.join(sites or ())}")
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> "TransformerConfig":
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
        if self.attention == "flash" and (
            self.weights.kind != "softmax" or self.scores.kind in ("synthesizer", "routing")
        ):
            other = "scores" if self.weights.kind == "softmax" else "weights"
            raise ValueError(
                f"attention=flash: no kernel has {other}.kind={getattr(self, other).kind}; take attention=auto"
            )
        if self.l0.enabled and self.learned_dropout.enabled:
            raise ValueError("l0 and learned_dropout are both enabled; set learned_dropout.enabled=false, or l0's")
        if self.learned_dropout.detach_embed and self.learned_dropout.source != "embed":
            raise ValueError("learned_dropout.detach_embed is about source=embed; leave it out")
        return self

    @model_validator(mode="after")
    def _gates_fit_the_feed_forward(self) -> "TransformerConfig":
        gates = self.block_gates
        if gates.kind == "none":
            return self
        if self.hidden_width % gates.blocks:
            width = -(-self.hidden_width // gates.blocks) * gates.blocks
            raise ValueError(
                f"block_gates.blocks={gates.blocks} does not divide the {self.hidden_width} hidden units of a feed "
                f"forward; take ff_width={width}"
            )
        for key, sites in (("learned_dropout", self.dropout_sites), ("l0", self.l0_sites)):
            if twice := [site for site in self.gate_sites if site in sites]:
                raise ValueError(
                    f"block_gates and {key} would both stand at {' and '.join(twice)}, two masks on one update; name "
                    f"other sites in {key}.sites, or set {key}.enabled=false"
                )
        least = gates.num_open if gates.kind == "top" else 1
        _check_left("block_gates.left", gates.left, self._places(self.gate_sites), range(least, gates.blocks + 1))
        return self

    @model_validator(mode="after")
    def _what_is_left_was_there(self) -> "TransformerConfig":
        group = self.queries_per_kv_head
        attentions = self._places(tuple(site for site in _ATTENTIONS if site in self.traits.sites))
        for place, heads in self.heads_left.items():
            most = self.heads_of("cross" if "cross" in place else "dec_sa")
            _check_left("heads_left", {place: heads}, attentions, range(group, most + 1, group))
        if self.heads_left and (why := self.why_heads_stay):
            raise ValueError(f"heads_left: {why}")
        masked = tuple(site for site in (*self.dropout_sites, *self.l0_sites) if site.endswith("_ff"))
        _check_left("channels_left", self.channels_left, self._places(masked), range(1, self.width + 1))
        return self

    @property
    def why_heads_stay(self) -> str:
        """What keeps single heads from being taken out; empty where nothing does."""
        if self.scores.kind != "dot":
            return f"scores.kind={self.scores.kind} makes the scores of all heads together"
        if any(len(patterns) > 1 for patterns in self.patterns):
            return f"pattern.kind={self.pattern.kind} gives halves of the heads patterns of their own"
        return ""

    def _places(self, sites: tuple[Site, ...]) -> list[str]:
        return [f"{site}/{layer:02d}" for site in sites for layer in range(self.masks_at(site))]

    @model_validator(mode="after")
    def _steps_fit(self) -> "TransformerConfig":
        steps = self.recurrence.steps
        if steps == 1:
            return self
        if not self.traits.recurrent:
            raise ValueError(
                f"recurrence.steps={steps}: the layers of {self.architecture} are applied once; decoder_only, "
                "encoder_only and parallel_encoder_decoder can apply theirs several times"
            )
        if self.norm == "batchnorm":
            raise ValueError(
                f"norm=batchnorm keeps one running mean for each norm, and recurrence.steps={steps} would mix those of "
                "its steps in it: take layernorm or rmsnorm"
            )
        if self.dropout_sites and self.learned_dropout.eval_rounding == "sample":
            raise ValueError(
                f"learned_dropout.eval_rounding=sample draws by site and position, so all recurrence.steps={steps} "
                "would draw the same: take threshold or none"
            )
        masks = {"learned_dropout": self.dropout_sites, "l0": self.l0_sites, "block_gates": self.gate_sites}
        for key, sites in masks.items():
            if sites and self.recurrence.halt:
                raise ValueError(
                    f"recurrence.halt with {key}: a token that has halted passes its masks by, which would still be "
                    "penalised and told of; leave one of them out"
                )
        return self


def _check_left(key: str, left: dict[str, int], places: list[str], counts: range) -> None:
    for place, count in left.items():
        if place not in places or count not in counts:
            what = "blocks" if key == "block_gates.left" else key.removesuffix("_left")
            steps = f" in steps of {counts.step}" if counts.step > 1 else ""
            raise ValueError(
                f"{key}: {place}: {count}; expected {counts[0]} to {counts[-1]} {what}{steps} of one of "
                f"{', '.join(places)}"
            )


class TwoStreamConfig(TransformerConfig, frozen=True):
    """An encoder, and a decoder whose layers read it by cross attention."""

    cross_heads: int | None = Field(default=None, ge=1)
    """Heads of cross attention; twice `heads` unless given."""
    decoder_order: Literal["self_cross_ff", "cross_self_ff"] = "self_cross_ff"
    """Order within a decoder layer."""
    decoder_residual_writes: Literal[2, 3] = 2
    """Maps that write to the decoder's stream start at 0.02 / sqrt(this x layers); a decoder layer writes 3 times."""

    @property
    def crosses_aligned(self) -> bool:
        """Cross attention is from one place of a text to others of it, so that their distance means something."""
        return not self.traits.two_sequences

    @property
    def num_cross_heads(self) -> int:
        """Heads of cross attention."""
        return self.cross_heads or 2 * self.heads

    @property
    def heads_by_key(self) -> dict[str, int]:
        """Heads of each attention, by the key that sets them."""
        return {"heads": self.heads, "cross_heads": self.num_cross_heads}
