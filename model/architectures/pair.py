"""A layer of each stream at a time (docs/model.md A13): their weights side by side, one product for both."""

import torch
from torch import Tensor, nn

from model.architectures.blocks import DecoderLayer, EncoderLayer, Residual
from model.attention.attention import SelfAttention
from model.attention.visibility import CAUSAL, Visible
from model.config.model_config import ModelConfig
from model.layers.layers import FeedForward, activate
from model.masks.site import Statistics


class Pair(nn.Module):
    """An encoder layer and a decoder layer that do not depend on each other; they stay the owners of their weights.

    The weights are put side by side in each forward pass. Cross attention and masks are computed for one stream.
    """

    def __init__(self, config: ModelConfig, encoder: EncoderLayer, decoder: DecoderLayer) -> None:
        """`decoder` reads what `encoder` reads."""
        super().__init__()
        self._config = config
        self._layers = (encoder, decoder)  # in a tuple: else their parameters would have a second name

    def forward(
        self, encoded: Tensor, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible = CAUSAL
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Both streams one layer on.

        Args:
            encoded: [B, T, C], what enters the encoder layer, and what the decoder layer reads of the encoder.
            x: [B, T, C], what enters the decoder layer.
            keys: of the noise, [B], or None in evaluation.
            source: of masks that share one, [B, T, C].
            visible: plainly causal; tells the masks of padding.

        Returns:
            both streams [B, T, C], and mask statistics.
        """
        encoder, decoder = self._layers
        layers: list[EncoderLayer | DecoderLayer] = [encoder, decoder]
        post_norm = self._config.norm_position == "post"
        streams = [Residual(start, keys, source, visible, post_norm) for start in (encoded, x)]
        cross_first = self._config.decoder_order == "cross_self_ff"
        if cross_first:
            decoder.cross(streams[1], encoded, keys)
        inputs = [stream.normed(layer.attention_norm) for stream, layer in zip(streams, layers, strict=True)]
        updates = self._attend((encoder.attention, decoder.attention), torch.stack(inputs), keys)
        for stream, layer, update in zip(streams, layers, updates, strict=True):
            stream.add(update, layer.attention_dropout, layer.attention_norm)
        if not cross_first:
            decoder.cross(streams[1], encoded, keys)
        inputs = [stream.normed(layer.ff_norm) for stream, layer in zip(streams, layers, strict=True)]
        updates = _feed_forward((encoder.ff, decoder.ff), torch.stack(inputs))
        for stream, layer, update in zip(streams, layers, updates, strict=True):
            stream.add(update, layer.ff_dropout, layer.ff_norm)
        return streams[0].x, streams[1].x, streams[1].statistics | streams[0].statistics

    def _attend(self, maps: tuple[SelfAttention, SelfAttention], x: Tensor, keys: Tensor | None) -> Tensor:
        """x [2, B, T, C] -> [2, B, T, C]."""
        first, second = maps
        qkv = linear((first.qkv, second.qkv), x)
        width, shared = self._config.width, self._config.width // self._config.queries_per_kv_head
        parts = qkv.split([width, shared, shared], dim=-1)
        if self._config.attention_rate and keys is not None:  # each has noise of its own
            found = torch.stack([own.attention(*(part[i] for part in parts), keys) for i, own in enumerate(maps)])
        else:
            found = first.attention(*(part.flatten(0, 1) for part in parts), None).unflatten(0, (2, -1))
        return linear((first.out, second.out), found)


def _feed_forward(maps: tuple[FeedForward, FeedForward], x: Tensor) -> Tensor:
    first, second = maps
    return linear((first.down, second.down), activate(linear((first.up, second.up), x), first.gated))


def linear(maps: tuple[nn.Linear, nn.Linear], x: Tensor) -> Tensor:
    """Each map of its half of x [2, B, T, C] -> [2, B, T, outputs]."""
    weights: list[Tensor] = [one.weight for one in maps]
    flat = x.flatten(1, 2)
    weight = torch.stack(weights).mT
    biases: list[Tensor] = [one.bias for one in maps if one.bias is not None]
    found = torch.baddbmm(torch.stack(biases)[:, None], flat, weight) if biases else torch.bmm(flat, weight)
    return found.unflatten(1, x.shape[1:3])
