"""What the architectures share: tables, last norm, tied head and loss, around an architecture's layers."""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence
from model.attention.cache import Cached
from model.attention.linformer import share_slots
from model.attention.visibility import CAUSAL, Visible, visible_in, visible_source, visible_target
from model.batch import Batch, ModelOutput
from model.config.mask_config import PenaltyConfig
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.layers.batch_norm import apply_norm
from model.layers.chunked_loss import TokenLoss
from model.layers.layers import INIT_STD, Embedding, TiedEmbedding, stream_norm
from model.layers.noise import sample_keys
from model.layers.positions import sinusoid
from model.masks.block_gates import BLOCK_PENALTY, block_gates
from model.masks.learned_dropout import MaskSource
from model.masks.penalties import weight_at
from model.masks.site import SiteDropout
from model.masks.sites import dropout_at
from model.masks.telemetry import KEPT


class TokenModel(Cached):
    """Predicts tokens from those that it sees; an architecture's `Backbone` says how."""

    def __init__(self, config: ModelConfig, backbone: Callable[[], Backbone]) -> None:
        """`config.vocab_size` is known; `backbone` makes the layers, after the tables."""
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.token_embed = TiedEmbedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embed = Embedding(config.context + config.uses_next_position, config.width)
        self.embed_dropout = dropout_at(config, "embed", 0)
        # Where norms come after the additions, the last layer's output is normed already.
        both_ways = not config.causal and not config.traits.two_sequences
        self.final_norm = stream_norm(config, both_ways=both_ways) if config.norm_position == "pre" else nn.Identity()
        self.mask_source = None
        if isinstance(config, TransformerConfig) and config.shares_mask_source:
            self.mask_source = MaskSource(config)
        if config.traits.two_sequences:
            self.target_dropout = dropout_at(config, "embed", 1)
        self.backbone = backbone()
        share_slots(self.backbone)

    @overload
    def forward(self, inputs: Batch) -> ModelOutput: ...
    @overload
    def forward(self, inputs: Tensor) -> Tensor: ...
    def forward(self, inputs: Batch | Tensor) -> ModelOutput | Tensor:
        """The loss of a batch; of bare ids [B, T] what `logits` gives.

        One entrance for both, because a partitioned model (ZeRO-3) gathers its weights only when called.
        """
        if isinstance(inputs, Tensor):
            return self.predict(inputs, None)
        keys = sample_keys(inputs.seed, inputs.step, inputs.samples) if self.training else None
        if self.config.document_mask and inputs.segment_ids is None:
            raise ValueError("model.document_mask is on, and the batch does not say where documents are")
        self._compute_open_blocks(inputs.step)
        found = self.learning(inputs, keys)
        tokens = self.token_loss(found.x, inputs)
        earlier = None if found.earlier is None else self.token_loss(found.earlier.x, inputs)
        return self._output(tokens, found, inputs.step, earlier)

    def token_loss(self, x: Tensor, inputs: Batch) -> TokenLoss:
        """Of a batch's labels, by what the head reads, x [B, T, C]."""
        return self.token_embed(x, inputs.labels, *self.loss_weights(inputs))

    def loss_weights(self, inputs: Batch) -> tuple[float, float, Tensor | None]:
        """Label smoothing and weight of the z-loss, which are for training, and what sums over labels are divided
        by."""
        smoothing, z_weight = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)
        return smoothing, z_weight, None if inputs.counts is None else inputs.counts.labels

    def learning(self, batch: Batch, keys: Tensor | None) -> Hidden:
        """`hidden` of a batch in training or validation, with what the architecture's own losses are."""
        return self.hidden(batch.input_ids, keys, batch)

    def predict(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T]; all else as in `hidden`."""
        return self.token_embed(self.hidden(input_ids, keys, batch).x)

    def hidden(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Hidden:
        """What the head reads, x [B, T, C], of input_ids [B, T], T <= context.

        `batch`: what else it says of these inputs: documents, prefixes, what a decoder reads. Where that is another
        sequence, [B, U], x is [B, U, C].

        Raises:
            ConfigError: the architecture reads two sequences, and there is one only; or its layers give something else.
        """
        embedded, source = self._read(input_ids, keys, batch)
        found = self.backbone(embedded, keys, source)
        if not isinstance(found, Hidden):
            given = f"{type(self.backbone).__name__}.forward() gave a {type(found).__name__}"
            raise ConfigError(f"{given}, and a Backbone gives a Hidden (model.architectures.backbone)")

        def finished(x: Tensor) -> Tensor:
            return self.backbone.finish(apply_norm(self.final_norm, x, keys, embedded.visible.padding), embedded)

        x = finished(found.x)
        if found.earlier is not None:
            found = found._replace(earlier=found.earlier._replace(x=finished(found.earlier.x)))
        if self.cache is not None:
            x = self.cache.asked(x)
        return found._replace(x=x)

    def embed(self, input_ids: Tensor, keys: Tensor | None, visible: Visible, dropout: SiteDropout) -> Embedded:
        """What a stream starts from: the tokens [B, T] in vectors, with positions and past a site."""
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        x, next_positions = self.with_positions(self.token_embed(input_ids), visible.positions)
        mask_source = None if self.mask_source is None else self.mask_source(x, visible)
        x, statistics = dropout(x, keys, mask_source, visible)
        return Embedded(x, next_positions, mask_source, visible, statistics, input_ids, self.token_embed)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each of input_ids [B, T], T <= context -> [B, T, V], with evaluation rounding."""
        return self(input_ids)

    def num_parameters(self) -> int:
        """All of them; the table that is also the head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _compute_open_blocks(self, step: Tensor) -> None:
        """Leave closed blocks out of training from the step on that is configured; waits for the device if one is."""
        gates = self.config.block_gates if isinstance(self.config, TransformerConfig) else None
        if gates is not None and gates.train_sparse_after is not None:
            for ff in block_gates(self):
                ff.sparse = gates.sparse_at(int(step))

    def _read(
        self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None
    ) -> tuple[Embedded, SourceSequence | None]:
        """The text in which tokens are predicted, and the one that is read for it if it is another."""
        if self.config.traits.two_sequences:
            if batch is None or batch.decoder_input_ids is None:
                raise ConfigError(f"{self.config.architecture} reads two sequences, and there is one only")
            within, across = visible_source(batch, self.config)
            source = self.embed(input_ids, keys, within, self.embed_dropout)
            target = self.embed(batch.decoder_input_ids, keys, visible_target(batch, self.config), self.target_dropout)
            return target, SourceSequence(source, across)
        if self.cache is None:
            visible = visible_in(input_ids, batch, self.config)
        else:
            visible = CAUSAL._replace(positions=self.cache.positions(input_ids.shape[1]))
        embedded = self.embed(input_ids, keys, visible, self.embed_dropout)
        return embedded, self.backbone.beside(embedded, batch)

    def _output(self, tokens: TokenLoss, found: Hidden, step: Tensor, earlier: TokenLoss | None) -> ModelOutput:
        """The loss of the tokens; in training plus that of the architecture and the penalties, means over the masks.

        Every mask counts alike. In evaluation the penalties are measured but do not enter the loss.
        """
        loss, config = tokens.loss, self.config
        metrics = {"cross_entropy": tokens.cross_entropy} | found.metrics
        mean = found.penalised
        if config.z_loss:
            metrics["z_loss"] = tokens.z_loss
        if found.statistics:
            names = dict.fromkeys(name for mask in found.statistics.values() for name in mask)
            told = {name: {mask: v[name] for mask, v in found.statistics.items() if name in v} for name in names}
            stacked = {name: torch.stack([*of_mask.values()]) for name, of_mask in told.items() if name != KEPT}
            mean = mean | {name: values.mean() for name, values in stacked.items()}
            if self.training and BLOCK_PENALTY in stacked:  # each feed forward's is a constraint of its own
                loss = loss + stacked[BLOCK_PENALTY].sum()
            metrics |= {f"{name}/{mask}": value for name, values in told.items() for mask, value in values.items()}
        for name, penalty in _penalties(config).items():
            if name in mean:
                weight = metrics[f"{name}_weight"] = weight_at(step, penalty)
                if self.training:
                    loss = loss + weight * mean[name]
        metrics |= mean
        if found.earlier is not None and earlier is not None:
            loss = loss + found.earlier.weight * earlier.loss
            metrics["earlier_cross_entropy"] = earlier.cross_entropy
        if found.auxiliary is not None:
            loss = loss + found.auxiliary
        metrics["loss"] = loss
        return ModelOutput(
            loss, {name: value.detach() for name, value in metrics.items()}, tokens.by_token, tokens.chosen
        )

    def with_positions(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, C] with their positions, and the position vectors one further where they are used.

        Positions [B, T] give vectors [B, T, C]; without them all rows share [T, C].
        """
        uses_next = self.config.uses_next_position
        if self.config.positions == "rotary":
            return x, None
        if positions is not None:
            return x + self._vectors(positions), self._vectors(positions + 1) if uses_next else None
        length = x.shape[1]
        vectors = self._vectors(torch.arange(length + uses_next, device=x.device))
        return x + vectors[:length], vectors[1:] if uses_next else None

    def _vectors(self, positions: Tensor) -> Tensor:
        """Positions [..., T] -> their vectors [..., T, C]."""
        if self.config.positions == "learned":
            return self.position_embed(positions)
        # As large as a table that starts at N(0, 0.02), or the sines would drown the tokens.
        return (sinusoid(positions, self.config.width) * (2**0.5 * INIT_STD)).to(self.token_embed.weight.dtype)


def _penalties(config: ModelConfig) -> dict[str, PenaltyConfig]:
    """The penalties on masks, spans and steps, by the statistic that they penalise."""
    if not isinstance(config, TransformerConfig):
        return {}
    others: dict[str, PenaltyConfig] = {
        "block_entropy": config.block_gates.entropy,
        "span": config.weights.penalty,
        "ponder": config.recurrence.ponder,
    }
    if config.l0.enabled:
        return {"l0": config.l0} | others
    return {"entropy": config.learned_dropout.entropy, "l1": config.learned_dropout.l1} | others
