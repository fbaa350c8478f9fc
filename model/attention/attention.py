"""Multi-head attention, causal unless told otherwise: within a stream, and from one stream to another."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from data_pipeline.errors import ConfigError
from model.attention.cache import Cached
from model.attention.visibility import CAUSAL, Visible, attend_in_blocks
from model.config.transformer import TransformerConfig, TwoStreamConfig
from model.layers.dropout import noise_site, weight_dropout
from model.layers.layers import Linear
from model.layers.positions import rotate

_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class CausalAttention(Cached):
    """softmax(q k^T / sqrt(d)) v in each head of d channels, over positions up to the query's own.

    "Attention Is All You Need", equation 1, with a causal mask or what `visible` says instead. No parameters.
    """

    def __init__(
        self, config: TransformerConfig, heads: int, *, group: int = 1, name: str = "", rate: float = 0.0
    ) -> None:
        """Attention of `heads` heads of queries.

        Args:
            group: heads of queries that share one of keys and values.
            name: of this place; keys the noise.
            rate: of dropout on the weights, in training.
        """
        super().__init__()
        self.name = name
        self._config = config
        self.heads = heads
        self._group = group
        self._rate = rate
        self._site = noise_site(f"attention/{name}")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible = CAUSAL
    ) -> Tensor:
        """Query [B, T, C], key and value [B, T, C / group], noise keys [B] or None in evaluation -> [B, T, C].

        Keys and values may be of another length than the queries if `visible` is not causal.
        """
        query, key, value = self._in_heads(query, key, value, visible)
        if self.cache is not None:
            key, value, mask = self.cache.extend(self, key, value)
            visible = Visible(mask=mask)
        if self._group > 1:
            key, value = (x.repeat_interleave(self._group, dim=1) for x in (key, value))
        if self._config.attention == "explicit" or (self._rate and keys is not None):
            found = self._explicit(query, key, value, keys, visible)
        elif isinstance(visible.mask, BlockMask):
            found = attend_in_blocks(query, key, value, visible.mask)
        elif self._config.attention == "flash":
            found = _fused(query, key, value, visible)
        else:
            found = _plain(query, key, value, visible)
        return found.transpose(1, 2).flatten(2)

    def weights(self, query: Tensor, key: Tensor, visible: Visible = CAUSAL) -> Tensor:
        """What each query gives each key in evaluation, of tensors as `forward` takes them -> [B, H, T, S]."""
        query, key, _ = self._in_heads(query, key, key, visible)
        return _softmax(query, key.repeat_interleave(self._group, dim=1), visible)

    def _in_heads(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, d], key and value [B, H / group, S, d], turned by their positions where these are rotary."""
        query = query.unflatten(-1, (self.heads, -1))
        key, value = (x.unflatten(-1, (self.heads // self._group, -1)) for x in (key, value))
        if self._config.positions == "rotary" and visible.aligned:
            positions = visible.positions
            if positions is None:
                positions = torch.arange(query.shape[1], device=query.device)
            query, key = rotate(query, positions), rotate(key, positions)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        weights = _softmax(query, key, visible).to(value.dtype)
        if self._rate and keys is not None:
            weights = weight_dropout(weights, keys, self._site, self._rate, self._config.context)
        return weights @ value


def _softmax(query: Tensor, key: Tensor, visible: Visible) -> Tensor:
    """Weights [B, H, T, S] in fp32 at least, of query [B, H, T, d] and key [B, H, S, d]."""
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    mask = visible.mask
    assert not isinstance(mask, BlockMask)
    if mask is None and visible.causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _plain(query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> Tensor:
    """What torch takes; the mask of `visible` is dense."""
    assert not isinstance(visible.mask, BlockMask)
    causal = visible.causal and visible.mask is None
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible.mask, is_causal=causal)


def _fused(query: Tensor, key: Tensor, value: Tensor, visible: Visible = CAUSAL) -> Tensor:
    try:
        with sdpa_kernel(_FUSED):
            return _plain(query, key, value, visible)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("No available kernel", "No viable backend")):
            raise
        raise ConfigError(
            f"model.attention=flash: torch has no fused kernel for heads of {query.shape[-1]} channels in "
            f"{query.dtype} on {query.device.type}; take auto"
        ) from error


class SelfAttention(nn.Module):
    """Attention of a stream to itself."""

    def __init__(self, config: TransformerConfig, name: str, std: float) -> None:
        """One projection [3C, C] for queries, keys and values (fewer rows with grouped queries), one [C, C] out.

        Args:
            name: of this place; keys the noise.
            std: start of the map out.
        """
        super().__init__()
        group = config.queries_per_kv_head
        self._sizes = [config.width, config.width // group, config.width // group]
        self.qkv = Linear(config.width, sum(self._sizes), bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias, std=std)
        self.attention = CausalAttention(config, config.heads, group=group, name=name, rate=config.attention_rate)

    def forward(self, x: Tensor, keys: Tensor | None, visible: Visible = CAUSAL) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        query, key, value = self.qkv(x).split(self._sizes, dim=-1)
        return self.out(self.attention(query, key, value, keys, visible))


class CrossAttention(nn.Module):
    """Attention of one stream to another; causal, position t sees the other's up to t, of a stream as long."""

    def __init__(self, config: TwoStreamConfig, name: str, std: float) -> None:
        """Projections [C, C] for queries, [2C, C] for keys and values, [C, C] out; `name` and `std` as above."""
        super().__init__()
        group, heads = config.queries_per_kv_head, config.num_cross_heads
        self.query = Linear(config.width, config.width, bias=config.bias)
        self.key_value = Linear(config.width, 2 * (config.width // group), bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias, std=std)
        self.attention = CausalAttention(config, heads, group=group, name=name, rate=config.attention_rate)

    def forward(self, x: Tensor, other: Tensor, keys: Tensor | None, visible: Visible = CAUSAL) -> Tensor:
        """Queries from x [B, T, C], keys and values from other [B, S, C] -> [B, T, C]; S = T if it is causal."""
        key, value = self.key_value(other).chunk(2, dim=-1)
        return self.out(self.attention(self.query(x), key, value, keys, visible))
