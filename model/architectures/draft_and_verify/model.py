"""One encoder and two decoders: one writes token by token, the other drafts all of the target at once.

A place that is hidden from the draft holds token 0 and a learned vector; shown ones have a vector of their own, so a
stack that both decoders share knows which of them it is.
"""

from torch import Tensor, nn

from model.architectures.backbone import Backbone, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig
from model.attention.attention import Projected
from model.attention.visibility import Visible
from model.layers.layers import Embedding, Linear, stream_norm
from model.masks.site import Statistics

_OTHER_NOISE = 0x5DEECE66D
"""A stack that runs twice must not meet the same noise twice."""
Read = Tensor | list[Projected]
"""What decoder layers read: vectors [B, S, C], or what each of them has made of these."""


class DraftAndVerify(Backbone):
    """L encoder layers, L decoder layers, the draft's own unless they are shared, and the head of the length."""

    def __init__(self, config: DraftAndVerifyConfig) -> None:
        """The layers, and what stands between them."""
        super().__init__()
        self._shared = config.draft.share
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))
        if not self._shared:
            layers = range(config.num_draft_layers)
            self.draft_decoder = nn.ModuleList(DecoderLayer(config, layer, "draft") for layer in layers)
        self.marks = Embedding(2, config.width)
        self.draft_norm = stream_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.length_norm = stream_norm(config)
        self.length = Linear(config.width, config.context, bias=config.bias)

    @property
    def drafting_layers(self) -> nn.ModuleList:
        """Those that a draft goes through."""
        return self.decoder if self._shared else self.draft_decoder

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """Without a draft; see `Backbone.forward`."""
        assert source is not None
        read, statistics = self.encode(source.embedded, keys)
        found = self.write(embedded, keys, read, source.across)
        return found._replace(statistics=statistics | found.statistics)

    def encode(self, source: Embedded, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """A source in vectors [B, S, C]."""
        return one_stream(self.encoder, source, keys)

    def write(self, embedded: Embedded, keys: Tensor | None, read: Read, across: Visible) -> Hidden:
        """From what is written up to each place, what predicts the next token: x [B, U, C], before the last norm."""
        return _decode(self.decoder, embedded.tokens, embedded, keys, read, across)

    def draft(self, embedded: Embedded, hidden: Tensor, keys: Tensor | None, read: Read, across: Visible) -> Hidden:
        """From the places that are shown, what predicts the token of each: x [B, U, C], normed; hidden [B, U] bool."""
        if keys is not None and self._shared:
            keys = keys ^ _OTHER_NOISE
        x = embedded.tokens + self.marks(hidden.long())
        found = _decode(self.drafting_layers, x, embedded, keys, read, across)
        statistics = found.statistics
        if self._shared:
            statistics = {_of_draft(name): of_mask for name, of_mask in statistics.items()}
        return found._replace(x=self.draft_norm(found.x), statistics=statistics)

    def lengths(self, read: Tensor, padding: Tensor | None) -> Tensor:
        """Logits [B, N] of the lengths 1 to N of the target, from the mean of the source's vectors [B, S, C].

        `padding`: [B, S] bool, which do not count.
        """
        if padding is None:
            return self.length(self.length_norm(read.mean(1)))
        counts = (~padding).to(read.dtype)[..., None]
        return self.length(self.length_norm((read * counts).sum(1) / counts.sum(1).clamp(min=1)))


def _decode(
    layers: nn.ModuleList, x: Tensor, embedded: Embedded, keys: Tensor | None, read: Read, across: Visible
) -> Hidden:
    statistics = embedded.statistics.copy()
    for number, layer in enumerate(layers):
        other = read if isinstance(read, Tensor) else read[number]
        x, masks = layer(x, other, keys, embedded.mask_source, embedded.visible, across)
        statistics |= masks
    return Hidden(x, statistics)


def projected(layers: nn.ModuleList, read: Tensor) -> list[Projected]:
    """What decoder layers make of the vectors [B, S, C] that they read."""
    return [layer.read(read) for layer in layers if isinstance(layer, DecoderLayer)]


def _of_draft(mask: str) -> str:
    """What a mask of the shared stack is called when it drafts; those of embedded texts have a number each."""
    return mask if mask.startswith("embed") else f"draft_{mask.removeprefix('dec_')}"
