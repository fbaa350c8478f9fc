"""What the causal language models share: tables, final norm, tied head and objective."""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from model.cache import Cached
from model.config import ModelConfig
from model.dropout import Statistics
from model.interface import Batch, ModelOutput
from model.layers import INIT_STD, Embedding, TiedEmbedding, stream_norm
from model.learned_dropout import MaskSource
from model.noise import sample_keys
from model.objective import objective
from model.positions import sinusoid
from model.sites import dropout_at


class Embedded(NamedTuple):
    """What an architecture starts from."""

    tokens: Tensor
    """E [B, T, C]: the tokens, with their positions where these are added."""
    next_positions: Tensor | None
    """[T, C] or [B, T, C]: the position vectors of the tokens to predict, where the model uses them."""
    mask_source: Tensor | None
    """[B, T, C], where all masks come from one source."""


class Transformed(NamedTuple):
    """What an architecture gives."""

    x: Tensor
    """[B, T, C], before the final norm or after it; vector t depends on tokens up to t only."""
    statistics: Statistics
    encoder_loss: dict[str, Tensor]
    """In training, where it is on; else empty."""


class LanguageModel(Cached):
    """Predicts each token from those before it; an architecture says how, in `transform`."""

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
        self.final_norm = stream_norm(config) if config.norm_position == "pre" else nn.Identity()
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
        x, statistics, encoder_loss = self.hidden(inputs.input_ids, keys)
        smoothing, z_weight = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)
        tokens = self.token_embed(x, inputs.labels, smoothing, z_weight)
        return objective(tokens, inputs, statistics, encoder_loss, self.config, self.training)

    def predict(self, input_ids: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics, dict[str, Tensor]]:
        """Logits [B, T, V] of input_ids [B, T], T <= context; statistics and encoder loss as in `Transformed`."""
        x, statistics, encoder_loss = self.hidden(input_ids, keys)
        return self.token_embed(x), statistics, encoder_loss

    def hidden(self, input_ids: Tensor, keys: Tensor | None) -> Transformed:
        """What the head reads, x [B, T, C], of input_ids [B, T], T <= context."""
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        x, next_positions = self._with_positions(self.token_embed(input_ids))
        mask_source = None if self.mask_source is None else self.mask_source(x)
        x, embed_statistics = self.embed_dropout(x, keys, mask_source)
        x, statistics, encoder_loss = self.transform(Embedded(x, next_positions, mask_source), keys)
        x = self.final_norm(x)
        if self.config.subtract_next_position != "none":
            x = self.output_norm(x - next_positions)
        if self.cache is not None:
            x = x[:, -1:]  # nothing else is asked of the head, which is large
        return Transformed(x, embed_statistics | statistics, encoder_loss)

    def _with_positions(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, C] with their positions, and the position vectors one further where they are used."""
        if self.config.positions == "rotary":
            return x, None
        length = x.shape[1]
        if self.cache is None:
            positions = torch.arange(length + self._uses_next, device=x.device)
        else:
            positions = self.cache.positions(length + self._uses_next)
        if self.config.positions == "learned":
            vectors = self.position_embed(positions)
        else:  # as large as a table that starts at N(0, 0.02), or the sines would drown the tokens
            vectors = (sinusoid(positions, x.shape[2]) * (2**0.5 * INIT_STD)).to(x.dtype)
        return x + vectors[..., :length, :], vectors[..., 1:, :] if self._uses_next else None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each of input_ids [B, T], T <= context -> [B, T, V], with evaluation rounding."""
        return self(input_ids)

    def num_parameters(self) -> int:
        """All of them; the table that is also the head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
