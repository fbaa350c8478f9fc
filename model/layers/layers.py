"""Linear maps, tables, norms and feed forward, each with its own initialisation (docs/model.md A8, A9).

Weights are drawn from torch's global generator when a module is made: seed it with `torch.manual_seed`, alike on
every rank, before building.
"""

from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config.model_config import ModelConfig
from model.config.transformer import Activation, TransformerConfig
from model.layers.batch_norm import BatchNorm
from model.layers.chunked_loss import TokenLoss, token_loss

INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear layer that starts at N(0, std), bias 0."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float = INIT_STD) -> None:
        """Weight [outputs, inputs]; std of its start."""
        self.std = std  # read by reset_parameters, which the constructor below calls
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Start anew."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table [rows, C] that starts at N(0, 0.02)."""

    def reset_parameters(self) -> None:
        """Start anew."""
        nn.init.normal_(self.weight, std=INIT_STD)


class TiedEmbedding(Embedding):
    """The token table [V, C], which is also the output head.

    One module for both, so that ZeRO-3 gathers the table where it is used.
    """

    @overload
    def forward(self, inputs: Tensor) -> Tensor: ...
    @overload
    def forward(
        self, inputs: Tensor, labels: Tensor, smoothing: float, z_weight: float, count: Tensor | None
    ) -> TokenLoss: ...
    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        smoothing: float = 0.0,
        z_weight: float = 0.0,
        count: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """ids [B, T] int64 -> vectors [B, T, C]; vectors [B, T, C] -> logits [B, T, V], or their loss.

        With labels [B, T] the logits are made by chunks and never returned; see `token_loss`.
        """
        if not inputs.is_floating_point():
            return super().forward(inputs)
        if labels is None:
            return functional.linear(inputs, self.weight)
        return token_loss(inputs, self.weight, labels, smoothing, z_weight, count)


def stream_norm(config: ModelConfig, *, both_ways: bool = False) -> nn.LayerNorm | nn.RMSNorm | BatchNorm:
    """Norm over C, eps 1e-5, with a bias only where the model has biases (RMSNorm never).

    `both_ways`: of a stream whose positions all see each other; only there does BatchNorm stand.
    """
    if config.norm == "batchnorm" and both_ways:
        return BatchNorm(config.width, bias=config.bias)
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=1e-5)
    return nn.LayerNorm(config.width, eps=1e-5, bias=config.bias)


def residual_std(config: ModelConfig, writes: int = 2) -> float:
    """Start of every map that writes to a residual stream: 0.02 / sqrt(writes x depth) (GPT-2, section 2.3)."""
    return INIT_STD / (writes * config.depth) ** 0.5


class FeedForward(nn.Module):
    """C -> F -> C, position by position: a GELU, or SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig, std: float) -> None:
        """Maps [F, C] up ([2F, C] for SwiGLU) and [C, F] down; the latter writes to the stream and starts at std."""
        super().__init__()
        hidden = config.hidden_width
        self.activation = config.ff
        self.up = Linear(config.width, 2 * hidden if config.ff == "swiglu" else hidden, bias=config.bias)
        self.down = Linear(hidden, config.width, bias=config.bias, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.down(activate(self.up(x), self.activation))


class FewerChannels(FeedForward):
    """A feed forward that writes some channels of the stream only; what it would have written to others is 0."""

    channels: Tensor
    """[channels] int64, in order."""

    def __init__(self, config: TransformerConfig, std: float, channels: int) -> None:
        """The first of them, until a state says which."""
        super().__init__(config, std)
        self.down = Linear(config.hidden_width, channels, bias=config.bias, std=std)
        self.register_buffer("channels", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        found = super().forward(x)
        return found.new_zeros(x.shape).index_copy(-1, self.channels, found)


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """What lies between the maps of a feed forward: [..., F] -> [..., F] or, of SwiGLU, [..., 2F] -> [..., F]."""
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return functional.silu(gate) * value
    return functional.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
