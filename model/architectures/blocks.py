"""The layers of the streams (docs/model.md A3): each sublayer adds an update to the residual stream."""

from typing import Literal

from torch import Tensor, nn

from model.attention.attention import CrossAttention, Projected, SelfAttention
from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import Site
from model.config.transformer import TransformerConfig, TwoStreamConfig
from model.layers.batch_norm import apply_norm
from model.layers.layers import FeedForward, residual_std, stream_norm
from model.masks.block_gates import BlockFeedForward
from model.masks.site import SiteDropout, Statistics
from model.masks.sites import dropout_at, feed_forward_at


class Residual:
    """A stream on its way through a layer: x grows by updates that each pass their site; statistics are collected."""

    def __init__(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible, post_norm: bool
    ) -> None:
        """x [B, T, C]; noise keys [B] or None in evaluation; source [B, T, C] of masks that share one.

        `visible`: to the stream's own attention, and so to that of its masks.
        """
        self.x = x
        self.statistics: Statistics = {}
        self._keys = keys
        self._source = source
        self._visible = visible
        self._post_norm = post_norm

    def normed(self, norm: nn.Module) -> Tensor:
        """What a sublayer reads: x after its norm, or x itself where the norm comes after the addition."""
        return self.x if self._post_norm else self._norm(norm, self.x)

    def add(
        self,
        update: Tensor,
        dropout: SiteDropout,
        norm: nn.Module,
        attention: SelfAttention | CrossAttention | None = None,
    ) -> None:
        """x + dropout(update); normed where the norm comes after the addition.

        `attention`: that the update is of, for what it tells.
        """
        if attention is not None:
            self.statistics |= attention.attention.mixer.told()
        update, statistics = dropout(update, self._keys, self._source, self._visible)
        self.statistics |= statistics
        self.x = self._norm(norm, self.x + update) if self._post_norm else self.x + update

    def feed(self, ff: FeedForward | BlockFeedForward, dropout: SiteDropout, norm: nn.Module) -> None:
        """Add what a feed forward makes of the stream."""
        if isinstance(ff, BlockFeedForward):
            update, statistics = ff(self.normed(norm), self._keys, self._visible)
            self.statistics |= statistics
        else:
            update = ff(self.normed(norm))
        self.add(update, dropout, norm)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return apply_norm(norm, x, self._keys, self._visible.padding)


class EncoderLayer(nn.Module):
    """Self attention, then feed forward. A decoder-only model is made of these, too."""

    def __init__(self, config: TransformerConfig, layer: int, *, alone: bool = False) -> None:
        """`layer` counts from 0 in its stream; `alone`: the only stream, whose sites are called the decoder's."""
        super().__init__()
        self._post_norm = config.norm_position == "post"
        std = residual_std(config)
        self.attention_norm = stream_norm(config, both_ways=not config.causal)
        name = f"{'dec' if alone else 'enc'}_sa/{layer:02d}"
        self.attention = SelfAttention(config, name, std, layer, both_ways=not config.causal)
        self.attention_dropout = dropout_at(config, "dec_sa" if alone else "enc_sa", layer)
        self.ff_norm = stream_norm(config, both_ways=not config.causal)
        self.ff = feed_forward_at(config, "dec_ff" if alone else "enc_ff", layer, std)
        self.ff_dropout = dropout_at(config, "dec_ff" if alone else "enc_ff", layer)

    def forward(
        self, x: Tensor, keys: Tensor | None, source: Tensor | None, visible: Visible = CAUSAL
    ) -> tuple[Tensor, Statistics]:
        """x and source [B, T, C], noise keys [B] or None in evaluation -> x [B, T, C] and mask statistics."""
        stream = Residual(x, keys, source, visible, self._post_norm)
        update = self.attention(stream.normed(self.attention_norm), keys, visible)
        stream.add(update, self.attention_dropout, self.attention_norm, self.attention)
        stream.feed(self.ff, self.ff_dropout, self.ff_norm)
        return stream.x, stream.statistics

    def keep(self, x: Tensor, visible: Visible, steps: range) -> None:
        """Of x [B, T, C], which passes these further steps as it is, the keys and values of each."""
        self.attention.keep(x if self._post_norm else self.attention_norm(x), visible, steps)


class DecoderLayer(nn.Module):
    """Self attention, cross attention to the encoder, feed forward.

    Cross attention sees of the encoder what self attention sees of the stream, or `across`.
    """

    def __init__(self, config: TwoStreamConfig, layer: int, stream: Literal["dec", "draft"] = "dec") -> None:
        """`layer` counts from 0 in its stream; `stream`: which decoder's, where there are two."""
        super().__init__()
        sites: tuple[Site, Site, Site] = ("dec_sa", "cross", "dec_ff")
        own, cross, ff = sites if stream == "dec" else ("draft_sa", "draft_cross", "draft_ff")
        self._post_norm = config.norm_position == "post"
        self._cross_first = config.decoder_order == "cross_self_ff"
        std = residual_std(config, config.decoder_residual_writes)
        self.attention_norm = stream_norm(config)
        self.attention = SelfAttention(config, f"{own}/{layer:02d}", std, layer)
        self.attention_dropout = dropout_at(config, own, layer)
        self.cross_norm = stream_norm(config)
        # The encoder's stream is normed already where norms come after the additions.
        self.encoder_norm = nn.Identity() if self._post_norm else stream_norm(config)
        self.cross_attention = CrossAttention(config, f"{cross}/{layer:02d}", std, layer)
        self.cross_dropout = dropout_at(config, cross, layer)
        self.ff_norm = stream_norm(config)
        self.ff = feed_forward_at(config, ff, layer, std)
        self.ff_dropout = dropout_at(config, ff, layer)

    def forward(
        self,
        x: Tensor,
        encoder: Tensor | Projected,
        keys: Tensor | None,
        source: Tensor | None,
        visible: Visible = CAUSAL,
        across: Visible | None = None,
    ) -> tuple[Tensor, Statistics]:
        """x and source [B, T, C], encoder [B, S, C], noise keys [B] or None in evaluation -> x, mask statistics.

        Of the encoder's vectors what `read` makes of them will do.
        """
        stream = Residual(x, keys, source, visible, self._post_norm)
        for cross in (self._cross_first, not self._cross_first):
            if cross:
                self.cross(stream, encoder, keys, across or visible)
            else:
                update = self.attention(stream.normed(self.attention_norm), keys, visible)
                stream.add(update, self.attention_dropout, self.attention_norm, self.attention)
        stream.feed(self.ff, self.ff_dropout, self.ff_norm)
        return stream.x, stream.statistics

    def keep(self, x: Tensor, encoder: Tensor, visible: Visible, steps: range) -> None:
        """Of x and encoder [B, T, C], which pass these further steps as they are, the keys and values of each."""
        self.attention.keep(x if self._post_norm else self.attention_norm(x), visible, steps)
        self.cross_attention.keep(self.encoder_norm(encoder), visible, steps)

    def read(self, encoder: Tensor) -> Projected:
        """What cross attention takes of encoder [B, S, C], to be computed once where the layer is run again."""
        return self.cross_attention.read(self.encoder_norm(encoder))

    def cross(
        self, stream: Residual, encoder: Tensor | Projected, keys: Tensor | None, visible: Visible = CAUSAL
    ) -> None:
        """Cross attention of the stream to encoder [B, S, C]."""
        other = encoder if isinstance(encoder, Projected) else self.encoder_norm(encoder)
        update = self.cross_attention(stream.normed(self.cross_norm), other, keys, visible)
        stream.add(update, self.cross_dropout, self.cross_norm, self.cross_attention)
