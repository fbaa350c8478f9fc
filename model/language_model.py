"""What the causal language models share: tables, final norm, tied head and objective."""

from typing import overload

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.interface import Batch, ModelOutput
from model.layers import Embedding, TiedEmbedding, layer_norm
from model.learned_dropout import Statistics
from model.noise import sample_keys
from model.objective import objective


class LanguageModel(nn.Module):
    """Predicts each token from those before it; an architecture says how, in `transform`."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.token_embed = TiedEmbedding(config.vocab_size, config.width)
        self.position_embed = Embedding(config.context, config.width)
        self.final_norm = layer_norm(config)

    def transform(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """Embedded tokens [B, T, C] -> vectors [B, T, C] before the final norm, and mask statistics.

        Vector t depends on tokens up to t only. `keys` [B] key the noise; None asks for evaluation rounding.
        """
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
        logits, statistics = self.predict(inputs.input_ids, keys)
        return objective(logits, inputs, statistics, self.config.learned_dropout, self.training)

    def predict(self, input_ids: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """Logits [B, T, V] of input_ids [B, T], T <= context, and mask statistics; `keys` as in `transform`."""
        length = input_ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        positions = torch.arange(length, device=input_ids.device)
        x, statistics = self.transform(self.token_embed(input_ids) + self.position_embed(positions), keys)
        return self.token_embed(self.final_norm(x)), statistics

    def logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each of input_ids [B, T], T <= context -> [B, T, V], with evaluation rounding."""
        return self(input_ids)

    def num_parameters(self) -> int:
        """All of them; the table that is also the head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
