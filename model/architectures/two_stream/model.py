"""XLNet (Yang et al. 2019, arXiv:1906.08237, section 2.3): docs/model.md I.

Tokens come in the order in which they are read, each with its place in the text, so that both streams are plainly
causal: the query behind the token number t of the order has the place of token t + 1, and sees tokens up to t, which is
what token t itself sees. Behind one another the two streams pass the same layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import EncoderLayer
from model.architectures.token_model import TokenModel
from model.architectures.two_stream.spec import XLNetConfig
from model.attention.forms import Asking
from model.attention.visibility import CAUSAL, Visible
from model.batch import IGNORE, Batch
from model.layers.layers import INIT_STD


class QueryStart(nn.Module):
    """What every query starts from: a module, since ZeRO-3 gathers what is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(nn.init.normal_(torch.empty(width), std=INIT_STD))

    def forward(self, content: Tensor, count: int) -> Tensor:
        """Content [B, T, C] -> with so many queries behind it, [B, T + n, C]."""
        return torch.cat([content, self.vector.to(content.dtype).expand(len(content), count, -1)], dim=1)


class ContentAndQuery(Backbone):
    """L layers that both streams pass."""

    def __init__(self, config: XLNetConfig) -> None:
        """Layers whose sites are called the decoder's."""
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer, alone=True) for layer in range(config.layers))
        self.query_start = QueryStart(config.width)

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`; what the queries have become, [B, n, C]."""
        x, statistics = one_stream(self.layers, embedded, keys)
        return Hidden(x[:, -embedded.visible.asking :], statistics)


class TwoStreams(TokenModel):
    """Tables and head around both streams. Where a batch says of no order, it is the text's own."""

    def __init__(self, config: XLNetConfig, backbone: Callable[[], Backbone]) -> None:
        """See `TokenModel`."""
        super().__init__(config, backbone)
        self._dense = config.needs_weights

    def _read(
        self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None
    ) -> tuple[Embedded, SourceSequence | None]:
        """Content, and behind it queries: as many as there are labels, or behind every token."""
        rows, length = input_ids.shape
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        if self.cache is not None:
            places, asked = self.cache.positions(length), self.cache.next_positions(length)
        else:
            places = torch.arange(length, device=input_ids.device).expand(rows, -1)
            if batch is not None and batch.position_ids is not None:
                places = batch.position_ids
            asked = places + 1 if batch is None or batch.query_positions is None else batch.query_positions
        positions = torch.cat([places, asked], dim=1)
        assert isinstance(self.backbone, ContentAndQuery)
        x = self.backbone.query_start(self.token_embed(input_ids), asked.shape[1])
        if self.config.positions != "rotary":
            x = x + self._vectors(positions)
        visible = self._visible(length, positions, asked.shape[1], batch)
        mask_source = None if self.mask_source is None else self.mask_source(x, visible)
        x, statistics = self.embed_dropout(x, keys, mask_source, visible)
        return Embedded(x, None, mask_source, visible, statistics, input_ids, self.token_embed), None

    def _visible(self, length: int, positions: Tensor, count: int, batch: Batch | None) -> Visible:
        visible = CAUSAL._replace(positions=positions, asking=count)
        if self.cache is not None:  # which has a mask of its own
            return visible
        asking = Asking.of(length, count, positions.device)
        visible = visible._replace(mask=asking.dense() if self._dense else asking)
        if batch is None or batch.padding is None:
            return visible
        return visible._replace(padding=torch.cat([batch.padding, batch.labels == IGNORE], dim=1))
