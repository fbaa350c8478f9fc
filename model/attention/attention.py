"""Multi-head attention, causal unless told otherwise: within a stream, and from one stream to another."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention.cache import Cached
from model.attention.forms import Asking
from model.attention.linformer import Linformer
from model.attention.routing import Routing
from model.attention.rule import Rows
from model.attention.softmax import Softmax
from model.attention.synthesizer import Synthesizer
from model.attention.visibility import CAUSAL, Visible
from model.attention.weights import mixer_of
from model.batch import RowExchange
from model.config.transformer import TransformerConfig, TwoStreamConfig
from model.layers.layers import Linear
from model.layers.positions import rotate


class CausalAttention(Cached):
    """Attention in heads of d channels, over positions up to the query's own or what `visible` says instead.

    It cuts into heads, turns by positions and keeps what a cache is to keep; the `Softmax` does the rest.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: int,
        *,
        layer: int = 0,
        group: int = 1,
        name: str = "",
        mixer: Softmax | None = None,
    ) -> None:
        """Attention of `heads` heads of queries.

        Args:
            layer: from 0 in its stream, whose pattern it has; what stands before the layers has the first one's.
            group: heads of queries that share one of keys and values.
            name: of this place.
            mixer: of the values; a softmax unless given.
        """
        super().__init__()
        self.name = name
        self._pattern = config.pattern_of(layer)
        self.patterns = config.patterns[self._pattern]
        self._config = config
        self.heads = heads
        self._group = group
        self.mixer = mixer or Softmax(config)
        if isinstance(self.mixer, Cached):
            self.mixer.patterns = self.patterns

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible = CAUSAL
    ) -> Tensor:
        """Query [B, T, C], key and value [B, T, C / group], noise keys [B] or None in evaluation -> [B, T, C].

        Keys and values may be of another length than the queries if `visible` is not causal.
        """
        visible = visible.of(self._pattern)
        query, key, value = self._in_heads(query, key, value, visible)
        if visible.asking:
            key, value = (x[:, :, : -visible.asking] for x in (key, value))
        if visible.share is not None:
            query, key, value = _all_positions(visible.share.exchange, query, key, value)
        if self.cache is not None and (visible.aligned or self.cache.crosses):
            key, value, mask = self.cache.extend(self, key, value)
            if visible.asking and mask is not None:
                mask = torch.cat([mask, mask[:, :, -visible.asking :]], dim=2)
            queries, keys_at = self.cache.places(self) if self.mixer.counts else (None, None)
            visible = Visible(causal=False, mask=mask, positions=queries, key_positions=keys_at)
        if self._group > 1:
            key, value = (x.repeat_interleave(self._group, dim=1) for x in (key, value))
        found = self.mixer(query, key, value, keys, visible).transpose(1, 2)
        if visible.share is not None:
            found = visible.share.exchange.positions(found)
        return found.flatten(2)

    def keep(self, key: Tensor, value: Tensor, visible: Visible, steps: range) -> None:
        """Put key and value [B, T, C / group] into the cache alone, as what these further steps would compute."""
        assert self.cache is not None
        heads = self.heads // self._group
        key, value = (_cut(x, heads) for x in (key, value))
        if self._config.positions == "rotary":
            assert visible.positions is not None
            key = rotate(key, visible.positions)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        for step in steps:
            self.cache.step = step
            self.cache.extend(self, key, value)
            self.mixer.keep(key)

    def weights(self, query: Tensor, key: Tensor, visible: Visible = CAUSAL) -> Tensor:
        """What each query gives each key of one text in evaluation, of tensors as `forward` takes -> [B, H, T, S]."""
        visible = visible.of(self._pattern)
        if not (visible.mask is None or isinstance(visible.mask, Tensor)):
            rows = Rows(query.shape[:2], query.device, visible.causal)
            mask = visible.mask.dense() if isinstance(visible.mask, Asking) else rows.dense(self.patterns)
            visible = visible._replace(mask=mask)
        query, key, _ = self._in_heads(query, key, key, visible)
        key = key[:, :, : -visible.asking or None]
        return self.mixer.weights(query, key.repeat_interleave(self._group, dim=1), visible)

    def _in_heads(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, d], key and value [B, H / group, S, d], turned by their positions where these are rotary."""
        query = _cut(query, self.heads)
        key, value = (_cut(x, self.heads // self._group) for x in (key, value))
        if self._config.positions == "rotary" and visible.aligned:
            positions = visible.positions
            if positions is None:
                positions = torch.arange(query.shape[1], device=query.device)
            query, key = rotate(query, positions), rotate(key, positions)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _all_positions(exchange: RowExchange, *vectors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T / ranks, d] of each, this rank's positions -> [B, H / ranks, T, d]: each head needs all of a text."""
    return tuple(x.transpose(1, 2) for x in exchange.heads(*(x.transpose(1, 2) for x in vectors)))


class SelfAttention(nn.Module):
    """Attention of a stream to itself."""

    def __init__(
        self, config: TransformerConfig, name: str, std: float, layer: int = 0, *, both_ways: bool = False
    ) -> None:
        """One projection [3C, C] for queries, keys and values (fewer rows with grouped queries), one [C, C] out.

        Args:
            name: of this place; keys the noise.
            std: start of the map out.
            layer: see `CausalAttention`.
            both_ways: each position sees those after it, too.
        """
        super().__init__()
        group, heads = config.queries_per_kv_head, config.heads_left.get(name, config.heads)
        queries, keys = config.score_channels
        self._sizes = [size * heads // config.heads for size in (queries, keys, config.width // group)]
        self.qkv = Linear(config.width, sum(self._sizes), bias=config.bias)
        self.out = Linear(config.width * heads // config.heads, config.width, bias=config.bias, std=std)
        mixer = _mixer(config, heads, name, both_ways)
        self.attention = CausalAttention(config, heads, layer=layer, group=group, name=name, mixer=mixer)

    def forward(self, x: Tensor, keys: Tensor | None, visible: Visible = CAUSAL) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.out(self.attention(*self._projected(x), keys, visible))

    def keep(self, x: Tensor, visible: Visible, steps: range) -> None:
        """Keep of x [B, T, C] what further steps would, and compute nothing else."""
        _, key, value = self._projected(x)
        self.attention.keep(key, value, visible, steps)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, T, C]."""
        query, key, value = self.qkv(x).split(self._sizes, dim=-1)
        if isinstance(self.attention.mixer, Routing):
            query, key = self.attention.mixer.routed(query, key)
        return query, key, value


class Projected(NamedTuple):
    """Keys and values of a sequence that cross attention reads, [B, S, C / group] each."""

    key: Tensor
    value: Tensor


def _mixer(config: TransformerConfig, heads: int, name: str, both_ways: bool) -> Softmax:
    """Of self attention: what the configuration says of scores and weights."""
    if config.scores.kind == "synthesizer":
        return Synthesizer(config, name)
    if config.scores.kind == "routing":
        return Routing(config, name, both_ways=both_ways)
    if config.scores.kind == "linformer" and both_ways:
        return Linformer(config, name)
    return mixer_of(config, heads, name)


def _cut(x: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [B, T, H, d]; of no channels, too."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


class CrossAttention(nn.Module):
    """Attention of one stream to another; causal, position t sees the other's up to t, of a stream as long."""

    def __init__(self, config: TwoStreamConfig, name: str, std: float, layer: int = 0) -> None:
        """Projections [C, C] for queries, [2C, C] for keys and values, [C, C] out; the rest as above."""
        super().__init__()
        group, heads = config.queries_per_kv_head, config.heads_left.get(name, config.num_cross_heads)
        inner = config.width * heads // config.num_cross_heads
        self.query = Linear(config.width, inner, bias=config.bias)
        self.key_value = Linear(config.width, 2 * (inner // group), bias=config.bias)
        self.out = Linear(inner, config.width, bias=config.bias, std=std)
        mixer = mixer_of(config, heads, name, aligned=config.crosses_aligned)
        self.attention = CausalAttention(config, heads, layer=layer, group=group, name=name, mixer=mixer)

    def read(self, other: Tensor) -> Projected:
        """Keys and values of other [B, S, C]."""
        return Projected(*self.key_value(other).chunk(2, dim=-1))

    def forward(self, x: Tensor, other: Tensor | Projected, keys: Tensor | None, visible: Visible = CAUSAL) -> Tensor:
        """Queries from x [B, T, C], keys and values from other [B, S, C] -> [B, T, C]; S = T if it is causal."""
        key, value = other if isinstance(other, Projected) else self.read(other)
        return self.out(self.attention(self.query(x), key, value, keys, visible))

    def keep(self, other: Tensor, visible: Visible, steps: range) -> None:
        """Keep of other [B, T, C] what further steps would, and compute nothing else."""
        key, value = self.key_value(other).chunk(2, dim=-1)
        self.attention.keep(key, value, visible, steps)
