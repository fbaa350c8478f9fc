"""What the architectures share: tables, final norm, tied head and objective."""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from model.architectures.objective import objective
from model.attention.cache import Cached
from model.attention.visibility import CAUSAL, Visible, visible_in
from model.batch import Batch, ModelOutput
from model.config.model_config import ModelConfig
from model.layers.batch_norm import apply_norm
from model.layers.layers import INIT_STD, Embedding, TiedEmbedding, stream_norm
from model.layers.noise import sample_keys
from model.layers.positions import sinusoid
from model.masks.learned_dropout import MaskSource
from model.masks.site import SiteDropout, Statistics
from model.masks.sites import dropout_at


class Embedded(NamedTuple):
    """What an architecture starts from."""

    tokens: Tensor
    """E [B, T, C]: the tokens, with their positions where these are added."""
    next_positions: Tensor | None
    """[T, C] or [B, T, C]: the position vectors of the tokens to predict, where the model uses them."""
    mask_source: Tensor | None
    """[B, T, C], where all masks come from one source."""
    visible: Visible
    """To self attention."""
    statistics: Statistics
    """Of the mask on E."""


class Transformed(NamedTuple):
    """What an architecture gives."""

    x: Tensor
    """[B, T, C], before the final norm or after it; in a causal model vector t depends on tokens up to t only."""
    statistics: Statistics
    encoder_loss: dict[str, Tensor]
    """In training, where it is on; else empty."""


class LanguageModel(Cached):
    """Predicts tokens from those that it sees; an architecture says how, in `transform`."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self._uses_next = config.add_next_position or config.subtract_next_position != "none"
        self.token_embed = TiedEmbedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embed = Embedding(config.context + self._uses_next, config.width)
        self.embed_dropout = dropout_at(config, "embed", 0)
        # Where norms come after the additions, the last layer's output is normed already.
        both_ways = config.architecture == "encoder_only"
        self.final_norm = stream_norm(config, both_ways=both_ways) if config.norm_position == "pre" else nn.Identity()
        self.output_norm = stream_norm(config) if config.subtract_next_position == "layer_norm" else nn.Identity()
        shared = config.dropout_sites and config.learned_dropout.source == "embed"
        self.mask_source = MaskSource(config) if shared else None

    def transform(self, embedded: Embedded, keys: Tensor | None) -> Transformed:
        """Run the layers. `keys` [B] key the noise of training; None asks for evaluation."""
        raise NotImplementedError

    @overload
    def forward(self, inputs: Batch) -> ModelOutput: ...
    @overload
    def forward(self, inputs: Tensor) -> Tensor: ...
    def forward(self, inputs: Batch | Tensor) -> ModelOutput | Tensor:
        """The objective of a batch; of bare ids [B, T] what `logits` gives.

        One entrance for both, because a partitioned model (ZeRO-3) gathers its weights only when called.
        """
        if isinstance(inputs, Tensor):
            return self.predict(inputs, None)[0]
        keys = sample_keys(inputs.seed, inputs.step, inputs.samples) if self.training else None
        if self.config.document_mask and inputs.segment_ids is None:
            raise ValueError("model.document_mask is on, and the batch does not say where documents are")
        x, statistics, encoder_loss = self.hidden(inputs.input_ids, keys, inputs)
        smoothing, z_weight = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)
        count = None if inputs.counts is None else inputs.counts.labels
        tokens = self.token_embed(x, inputs.labels, smoothing, z_weight, count)
        return objective(tokens, inputs, statistics, encoder_loss, self.config, self.training)

    def predict(
        self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None
    ) -> tuple[Tensor, Statistics, dict[str, Tensor]]:
        """Logits [B, T, V] of input_ids [B, T]; all else as in `hidden`."""
        x, statistics, encoder_loss = self.hidden(input_ids, keys, batch)
        return self.token_embed(x), statistics, encoder_loss

    def hidden(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Transformed:
        """What the head reads, x [B, T, C], of input_ids [B, T], T <= context.

        `batch`: what else it says of these inputs: documents, prefixes, what a decoder reads.
        """
        visible = CAUSAL._replace(causal=self.config.causal) if batch is None else visible_in(batch, self.config)
        if self.cache is not None:
            visible = visible._replace(positions=self.cache.positions(input_ids.shape[1]))
        embedded = self.embed(input_ids, keys, visible, self.embed_dropout)
        x, statistics, encoder_loss = self.transform(embedded, keys)
        x = apply_norm(self.final_norm, x, keys, visible.padding)
        if self.config.subtract_next_position != "none":
            assert embedded.next_positions is not None
            x = self.output_norm(x - embedded.next_positions)
        if self.cache is not None:
            x = self.cache.asked(x)
        return Transformed(x, embedded.statistics | statistics, encoder_loss)

    def embed(self, input_ids: Tensor, keys: Tensor | None, visible: Visible, dropout: SiteDropout) -> Embedded:
        """What a stream starts from: the tokens [B, T] in vectors, with positions and past a site."""
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        x, next_positions = self._with_positions(self.token_embed(input_ids), visible.positions)
        mask_source = None if self.mask_source is None else self.mask_source(x, visible)
        x, statistics = dropout(x, keys, mask_source, visible)
        return Embedded(x, next_positions, mask_source, visible, statistics)

    def _with_positions(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, C] with their positions, and the position vectors one further where they are used.

        Positions [B, T] give vectors [B, T, C]; without them all rows share [T, C].
        """
        if self.config.positions == "rotary":
            return x, None
        if positions is not None:
            return x + self._vectors(positions), self._vectors(positions + 1) if self._uses_next else None
        length = x.shape[1]
        vectors = self._vectors(torch.arange(length + self._uses_next, device=x.device))
        return x + vectors[:length], vectors[1:] if self._uses_next else None

    def _vectors(self, positions: Tensor) -> Tensor:
        """Positions [..., T] -> their vectors [..., T, C]."""
        if self.config.positions == "learned":
            return self.position_embed(positions)
        # As large as a table that starts at N(0, 0.02), or the sines would drown the tokens.
        return (sinusoid(positions, self.config.width) * (2**0.5 * INIT_STD)).to(self.token_embed.weight.dtype)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each of input_ids [B, T], T <= context -> [B, T, V], with evaluation rounding."""
        return self(input_ids)

    def num_parameters(self) -> int:
        """All of them; the table that is also the head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def one_stream(layers: nn.ModuleList, embedded: Embedded, keys: Tensor | None) -> Transformed:
    """Encoder layers, one after the other; see `LanguageModel.transform`."""
    x, statistics = embedded.tokens, Statistics()
    for layer in layers:
        x, masks = layer(x, keys, embedded.mask_source, embedded.visible)
        statistics |= masks
    return Transformed(x, statistics, {})
