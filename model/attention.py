"""Causal multi-head attention: within a stream, and from one stream to another."""

from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.layers import Linear, residual_std


def causal_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(C / heads)) v in each head, over positions up to the query's own.

    All of shape [B, T, C] ("Attention Is All You Need", equation 1, with a causal mask).
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Causal attention of a stream to itself."""

    def __init__(self, config: ModelConfig) -> None:
        """One projection [3C, C] for queries, keys and values, one [C, C] out."""
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias, std=residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(causal_attention(query, key, value, self.heads))


class CrossAttention(nn.Module):
    """Causal attention of one stream to another of the same length: position t sees the other's up to t."""

    def __init__(self, config: ModelConfig) -> None:
        """Projections [C, C] for queries, [2C, C] for keys and values, [C, C] out."""
        super().__init__()
        self.heads = config.num_cross_heads
        self.query = Linear(config.width, config.width, bias=config.bias)
        self.key_value = Linear(config.width, 2 * config.width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias, std=residual_std(config))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Queries from x [B, T, C], keys and values from other [B, T, C] -> [B, T, C]."""
        key, value = self.key_value(other).chunk(2, dim=-1)
        return self.out(causal_attention(self.query(x), key, value, self.heads))
