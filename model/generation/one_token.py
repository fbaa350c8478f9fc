"""The next token through a plain decoder in straight-line code: in a small model most of a token's time goes between
modules."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.blocks import EncoderLayer
from model.architectures.decoder_only.model import DecoderOnly
from model.architectures.token_model import TokenModel
from model.attention.attention import CausalAttention, SelfAttention
from model.attention.cache import Cache, Cached
from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.pattern_config import FULL
from model.config.transformer import TransformerConfig
from model.layers.layers import Embedding, FeedForward, Linear, TiedEmbedding, activate
from model.layers.positions import rotate
from model.masks.site import SiteDropout

_PARTS = {
    *(TokenModel, DecoderOnly, nn.ModuleList, EncoderLayer, SelfAttention, CausalAttention, Softmax, SiteDropout),
    *(FeedForward, Linear, Embedding, TiedEmbedding, nn.LayerNorm, nn.RMSNorm),
}
"""All that is followed here."""
_Map = Callable[[Tensor], Tensor]
"""Of rows [B, C]."""
_ALL = Visible(causal=False)


class _Layer(NamedTuple):
    attention_norm: _Map
    qkv: _Map
    place: CausalAttention
    """Whose keys and values the cache holds."""
    heads: list[int]
    """Of queries, keys and values."""
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of a query that sees all keys."""
    out: _Map
    ff_norm: _Map
    up: _Map
    down: _Map


class OneToken:
    """What `Cache.logits` computes of one new column, where no text is padded: the same kernels in the same order, so
    bit for bit the same. The first token is computed in both ways; should they differ, the modules go on alone."""

    def __init__(self, model: TokenModel, cache: Cache) -> None:
        """`cache` holds what the model has read so far."""
        config = model.config
        assert isinstance(config, TransformerConfig)
        self._model = model
        self._cache = cache
        self._group = config.queries_per_kv_head
        self._rotary, self._activation = config.positions == "rotary", config.ff
        self._layers = [_layer(layer, config) for layer in model.modules() if isinstance(layer, EncoderLayer)]
        self._final_norm = _norm(model.final_norm)
        self._head = _product(model.token_embed.weight)
        self._columns = torch.arange(config.context, device=model.token_embed.weight.device)
        self._agrees: bool | None = None

    @classmethod
    def of(cls, model: TokenModel, cache: Cache) -> Callable[[Tensor], Tensor]:
        """What goes on with a cache: the model's modules, unless nothing else stands in it than what is followed here,
        and nobody listens at its modules."""
        modules = list(model.modules())
        followed = (
            not cache.padded
            and {*map(type, modules)} <= _PARTS
            and model.config.norm_position == "pre"
            and model.config.depth == model.config.layers
            and all(module.patterns == (FULL,) for module in modules if isinstance(module, Cached))
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )
        return cls(model, cache) if followed else partial(cache.logits, model)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of the token after ids [B, 1], which come after those in the cache."""
        if self._agrees:
            return self._step(ids)
        found = self._cache.logits(self._model, ids)
        if self._agrees is None:
            self._cache.length -= 1
            self._agrees = torch.equal(found, self._step(ids))
        return found

    @torch.no_grad()
    def _step(self, ids: Tensor) -> Tensor:
        found = self._head(self._hidden(ids))
        self._cache.length += 1
        return found

    @torch.inference_mode()
    def _hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, [B, C]."""
        length, model = self._cache.length, self._model
        column = self._columns[length : length + 1]
        x, _ = model.with_positions(torch.embedding(model.token_embed.weight, ids[:, 0]), column)
        for layer in self._layers:
            x += layer.out(self._mixed(layer, layer.qkv(layer.attention_norm(x)), column))
            x += layer.down(activate(layer.up(layer.ff_norm(x)), self._activation))
        return self._final_norm(x)

    def _mixed(self, layer: _Layer, qkv: Tensor, column: Tensor) -> Tensor:
        """Queries, keys and values [B, C + 2 C / group] of a token -> [B, C]."""
        heads = qkv.view(len(qkv), sum(layer.heads), 1, -1)
        if self._rotary:
            turned, straight = heads.split([sum(layer.heads[:2]), layer.heads[2]], dim=1)
            heads = torch.cat([rotate(turned.transpose(1, 2), column).transpose(1, 2), straight], dim=1)
        query, key, value = torch.split_with_sizes(heads, layer.heads, 1)
        key, value = self._cache.append_one(layer.place, column, key, value)
        if self._group > 1:
            key, value = (x.repeat_interleave(self._group, dim=1) for x in (key, value))
        return layer.mix(query, key, value).reshape(len(qkv), -1)


def _layer(layer: EncoderLayer, config: TransformerConfig) -> _Layer:
    attention, ff = layer.attention, layer.ff
    assert isinstance(ff, FeedForward)
    place = attention.attention
    of_keys = place.heads // config.queries_per_kv_head
    mix = functional.scaled_dot_product_attention
    if config.attention != "auto":
        mix = partial(place.mixer.forward, keys=None, visible=_ALL)
    maps = (_linear(attention.out), _norm(layer.ff_norm), _linear(ff.up), _linear(ff.down))
    heads = [place.heads, of_keys, of_keys]
    return _Layer(_norm(layer.attention_norm), _linear(attention.qkv), place, heads, mix, *maps)


def _linear(module: nn.Linear) -> _Map:
    return _product(module.weight, module.bias)


def _product(weight: Tensor, bias: Tensor | None = None) -> _Map:
    """x W^T + b by the product that `functional.linear` comes to, without the way there."""
    transposed = weight.t()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


def _norm(module: nn.Module) -> _Map:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape, weight = list(module.normalized_shape), module.weight
    if isinstance(module, nn.RMSNorm):
        return partial(torch.rms_norm, normalized_shape=shape, weight=weight, eps=module.eps)
    bias, eps = module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
