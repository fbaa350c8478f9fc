"""The refined encoder-decoder (docs/model.md E5): an encoder whose vectors are refined K times, and a causal decoder.

Two-way attention for thinking, causal attention for writing, over one text: the decoder reads the refined vectors of
what is finished, a prefix or chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.architectures.backbone import Backbone, Earlier, Embedded, Hidden, SourceSequence, one_stream
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.refined.reading import Reading
from model.architectures.refined.spec import RefinedConfig
from model.architectures.refined.step import Refiner
from model.architectures.refined.thoughts import Thoughts
from model.attention.cache import Cache, Cached
from model.attention.visibility import ACROSS, Visible
from model.batch import Batch
from model.layers.dropout import noise_site
from model.layers.layers import INIT_STD
from model.layers.noise import of_step, uniform
from model.masks.site import Statistics

CHANGE = "refine_change"
_WHICH = noise_site("refine/which step")


class Refinement(NamedTuple):
    """What the steps made of the encoder's vectors."""

    last: Tensor
    """H_K [B, T, C]."""
    earlier: Tensor | None
    """[B, T, C]: of each sample H_k with a k of its own, 0 < k < K; None in evaluation and where there is none."""
    changes: list[Tensor]
    """Of each step in training |H_k - H_(k-1)| / |H_(k-1)|, over the batch, 0-d; detached."""
    statistics: Statistics
    """Of masks: means over the steps."""


class Null(nn.Module):
    """The memory that is there before anything is finished: a module, since ZeRO-3 gathers what is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(nn.init.normal_(torch.empty(width), std=INIT_STD))

    def forward(self, memory: Tensor) -> Tensor:
        """Memory [B, S, C] -> [B, 1 + S, C]."""
        return torch.cat([self.vector.to(memory.dtype).expand(len(memory), 1, -1), memory], dim=1)


class Refined(Backbone, Cached):
    """L encoder layers, one step that is taken K times, L decoder layers that read what came of it."""

    def __init__(self, config: RefinedConfig) -> None:
        """With K = 0 it is an encoder-decoder, and has no step."""
        super().__init__()
        self.config = config
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.refiner = nn.ModuleList([Refiner(config)] if config.refine.steps else [])
        self.null = Null(config.width)
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))

    def beside(self, embedded: Embedded, batch: Batch | None) -> SourceSequence | None:
        """The same embedded tokens, as the encoder reads them; nothing where `Thoughts` hold what was read."""
        if self.cache is not None:
            return None
        reading = Reading.of(embedded.ids, batch, self.config.chunk)
        return SourceSequence(read_by(reading, embedded), ACROSS._replace(mask=reading.across()))

    def forward(self, embedded: Embedded, keys: Tensor | None, source: SourceSequence | None = None) -> Hidden:
        """See `Backbone.forward`; where `Thoughts` hold what was read, the decoder alone."""
        if source is None:
            assert isinstance(self.cache, Thoughts)
            memory = self.cache.fresh(embedded.tokens)
            memory = embedded.tokens[:, :0] if memory is None else self.null(memory)
            return Hidden(*self._decode(embedded, None, memory, ACROSS))
        found = self.think(source.embedded, keys)
        statistics = embedded.statistics | found.statistics
        x, masks = self._decode(embedded, keys, self.null(found.last), source.across)
        if keys is None:
            return Hidden(x, statistics | masks)
        earlier = None
        if found.earlier is not None:
            again, _ = self._decode(embedded, keys, self.null(found.earlier), source.across)
            earlier = Earlier(again, self.config.refine.step_loss)
        changes = {f"{CHANGE}/{k:02d}": change for k, change in enumerate(found.changes, 1)}
        return Hidden(x, statistics | masks, metrics=changes, earlier=earlier)

    def think(self, read: Embedded, keys: Tensor | None, cache: Cache | None = None) -> Refinement:
        """Encode a text and refine what comes of it; `read.visible.mask` says what each vector may know.

        `cache`: that encoder and steps use, of which `read` is what comes next.
        """
        x, statistics = one_stream(self.encoder, read, keys)
        steps, turns, changes = self.config.refine.steps, list[Statistics](), list[Tensor]()
        chosen = earlier = None
        if keys is not None and steps > 1 and self.config.refine.step_loss:
            chosen, earlier = (uniform(keys, _WHICH, (1, 1)) * (steps - 1)).long(), x  # [B, 1, 1], from 0
        for k in range(steps):
            if cache is not None:
                cache.step = k
            before, turn = x, None if keys is None else of_step(keys, k)
            x, masks = self.refiner[0](x, turn, read.mask_source, read.visible, read.ids, self._table(read))
            turns.append(masks)
            if chosen is not None and earlier is not None and k < steps - 1:
                earlier = x.where(chosen == k, earlier)
            if keys is not None:
                changes.append((x.detach() - before.detach()).norm() / before.detach().norm())
        return Refinement(x, earlier, changes, statistics | _means(turns))

    def crossing(self) -> set[Cached]:
        """The attentions that read memory."""
        return {layer.cross_attention.attention for layer in self.decoder if isinstance(layer, DecoderLayer)}

    def _table(self, read: Embedded) -> Tensor | None:
        return read.table.weight if self.config.refine.gradient else None  # ZeRO-3 would gather it when it is named

    def _decode(
        self, embedded: Embedded, keys: Tensor | None, memory: Tensor, across: Visible
    ) -> tuple[Tensor, Statistics]:
        x, statistics = embedded.tokens, Statistics()
        for layer in self.decoder:
            x, masks = layer(x, memory, keys, embedded.mask_source, embedded.visible, across)
            statistics |= masks
        return x, statistics


def read_by(reading: Reading, embedded: Embedded) -> Embedded:
    """A text as the encoder and its steps see it."""
    return embedded._replace(visible=embedded.visible._replace(causal=False, mask=reading.within(), others=()))


def _means(turns: list[Statistics]) -> Statistics:
    """Of each mask, the means over the steps."""
    first = turns[0] if turns else {}
    return {
        mask: {name: torch.stack([turn[mask][name] for turn in turns]).mean(0) for name in names}
        for mask, names in first.items()
    }
