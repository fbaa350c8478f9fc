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
_ALL = Visible(causal=False)


class _Layer(NamedTuple):
    attention_norm: _Map
    qkv: _Map
    place: CausalAttention
    """Whose keys and values the cache holds."""
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
        self._layers = [_layer(layer) for layer in model.modules() if isinstance(layer, EncoderLayer)]
        self._final_norm = _norm(model.final_norm)
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
        positions, table = self._cache.positions(1), self._model.token_embed.weight
        x, _ = self._model.with_positions(functional.embedding(ids, table), positions)
        for layer in self._layers:
            x = x + layer.out(self._mixed(layer, layer.qkv(layer.attention_norm(x)), positions))
            x = x + layer.down(activate(layer.up(layer.ff_norm(x)), self._activation))
        self._cache.length += 1
        return functional.linear(self._final_norm(x), table)[:, 0]

    def _mixed(self, layer: _Layer, qkv: Tensor, positions: Tensor) -> Tensor:
        """Queries, keys and values [B, 1, C + 2 C / group] of a token -> [B, 1, C]."""
        of_keys = layer.place.heads // self._group
        sizes = [layer.place.heads, of_keys, of_keys]
        heads = qkv.view(len(qkv), sum(sizes), 1, -1)
        if self._rotary:
            turned, straight = heads.split([sum(sizes[:2]), of_keys], dim=1)
            heads = torch.cat([rotate(turned.transpose(1, 2), positions).transpose(1, 2), straight], dim=1)
        query, key, value = torch.split_with_sizes(heads, sizes, 1)
        key, value = self._cache.append(layer.place, key, value)
        if self._group > 1:
            key, value = (x.repeat_interleave(self._group, dim=1) for x in (key, value))
        return layer.place.mixer.forward(query, key, value, None, _ALL).reshape(len(qkv), 1, -1)


def _layer(layer: EncoderLayer) -> _Layer:
    attention, ff = layer.attention, layer.ff
    assert isinstance(ff, FeedForward)
    maps = (_linear(attention.out), _norm(layer.ff_norm), _linear(ff.up), _linear(ff.down))
    return _Layer(_norm(layer.attention_norm), _linear(attention.qkv), attention.attention, *maps)


def _linear(module: nn.Linear) -> _Map:
    return partial(functional.linear, weight=module.weight, bias=module.bias)


def _norm(module: nn.Module) -> _Map:
    if isinstance(module, nn.LayerNorm):
        shape, weight, bias = module.normalized_shape, module.weight, module.bias
        return partial(torch.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=module.eps)
    assert isinstance(module, nn.RMSNorm)
    return partial(torch.rms_norm, normalized_shape=module.normalized_shape, weight=module.weight, eps=module.eps)
