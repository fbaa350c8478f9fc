"""The layers of the two streams (docs/model.md A3): pre-norm, each block adding to the residual stream."""

from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention
from model.config import ModelConfig, Site
from model.layers import FeedForward, layer_norm
from model.learned_dropout import Statistics, dropout_at


class EncoderLayer(nn.Module):
    """Causal self attention, then feed forward. A decoder-only model is made of these, too."""

    def __init__(self, config: ModelConfig, layer: int, ff_site: Site = "enc_ff") -> None:
        """`layer` counts from 0 in its stream; `ff_site` is what learned dropout after the feed forward is called."""
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = SelfAttention(config)
        self.ff_norm = layer_norm(config)
        self.ff = FeedForward(config)
        self.ff_dropout = dropout_at(config, ff_site, layer)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """x [B, T, C], noise keys [B] or None in evaluation -> x [B, T, C] and the statistics of the masks."""
        x = x + self.attention(self.attention_norm(x))
        update, statistics = self.ff_dropout(self.ff(self.ff_norm(x)), keys)
        return x + update, statistics


class DecoderLayer(nn.Module):
    """Causal self attention, causal cross attention to the encoder's output of the same layer, feed forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """`layer` counts from 0 in its stream."""
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = SelfAttention(config)
        self.cross_norm = layer_norm(config)
        self.encoder_norm = layer_norm(config)
        self.cross_attention = CrossAttention(config)
        self.ff_norm = layer_norm(config)
        self.ff = FeedForward(config)
        self.ff_dropout = dropout_at(config, "dec_ff", layer)

    def forward(self, x: Tensor, encoder: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """x and encoder [B, T, C], noise keys [B] or None in evaluation -> x [B, T, C] and mask statistics."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross_attention(self.cross_norm(x), self.encoder_norm(encoder))
        update, statistics = self.ff_dropout(self.ff(self.ff_norm(x)), keys)
        return x + update, statistics
