"""The decoder of a refined model writes; whenever a chunk is finished, encoder and steps read it."""

import torch
from torch import Tensor, nn

from model.architectures.refined.model import Refined, read_by
from model.architectures.refined.thoughts import Thoughts
from model.architectures.rollback import RollbackCache
from model.architectures.token_model import TokenModel
from model.attention.rule import Rows
from model.attention.visibility import CAUSAL
from model.generation.sampling import Sampling
from model.generation.texts import Drawn, Texts


class Refining:
    """Of each token the decoder reads one position. Of a text with a chunk more that chunk is read, since the vectors
    of earlier ones know nothing of it; one whose prompt is its prefix is read once. When the longest text no longer
    fits the model's context, its last `context` tokens are read anew for every token, as by `Autoregressive`; of a
    prefix, all of them are it then. The others are read anew beside it, each with the prefix that it has.
    """

    def __init__(self, model: TokenModel, sampling: Sampling) -> None:
        assert isinstance(model.backbone, Refined)
        self._model, self._backbone, self._sampling = model, model.backbone, sampling
        self._thoughts: Thoughts | None = None
        self._read_before: RollbackCache | None = None
        """Keys and values of encoder and steps, of finished chunks."""
        self._readers = nn.ModuleList([self._backbone.encoder, self._backbone.refiner])
        self._finished = torch.empty(0, dtype=torch.int64)
        """[B], chunks of each text that were read, or 1 where its prefix was."""
        self._prompts: Tensor | None = None
        """[B], tokens of each prompt, at most the context."""

    def step(self, texts: Texts) -> Drawn:
        """The next token of each text."""
        logits = self._logits(texts)
        present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, texts.ids, True)
        tokens = self._sampling.draw(logits, present, texts.generators)
        return Drawn(texts.numbers, tokens[:, None], logits[:, None], present[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the texts, [B'] int64."""
        if self._thoughts is not None:
            self._thoughts.reorder(rows)
            if self._read_before is not None:
                self._read_before.reorder(rows)
            self._finished = self._finished[rows]
            self._prompts = None if self._prompts is None else self._prompts[rows]

    def _logits(self, texts: Texts) -> Tensor:
        context, length = self._model.config.context, texts.ids.shape[1]
        hidden = max(0, length - context)
        ids, padding = texts.ids[:, hidden:], (texts.padding - hidden).clamp(min=0)
        lengths, goes_on = ids.shape[1] - padding, self._thoughts is not None and not hidden
        if self._prompts is None:
            self._prompts = lengths
        if not goes_on:
            chunk = self._backbone.config.chunk
            prefixes = None if chunk else self._prompts.where(texts.padding >= hidden, lengths)
            self._thoughts = Thoughts(padding, context, self._backbone.crossing(), chunk, prefixes)
            self._finished = torch.zeros_like(padding)
            self._read_before = RollbackCache(len(ids), context, ids.device, chunk) if chunk else None
        assert self._thoughts is not None
        self._read(ids, lengths, self._thoughts)
        return self._thoughts.logits(self._model, ids[:, -1:] if goes_on else ids)

    def _read(self, ids: Tensor, lengths: Tensor, thoughts: Thoughts) -> None:
        """Read what is finished of texts of `lengths` [B], and was not read."""
        chunk, count = self._backbone.config.chunk, ids.shape[1]
        finished = lengths // chunk if chunk else torch.ones_like(lengths)
        rows = (finished > self._finished).nonzero()[:, 0]
        if not len(rows):
            return
        before, self._finished = self._finished, finished
        reading = thoughts.reading(count).of_rows(rows)
        columns = Rows(reading.positions.shape, ids.device, segments=reading.segments, positions=reading.positions)
        visible = CAUSAL._replace(mask=columns.dense(), positions=reading.positions.clamp(min=0))
        embedded = self._model.embed(ids[rows], None, visible, self._model.embed_dropout)
        if self._read_before is None:
            found = self._backbone.think(read_by(reading, embedded), None).last
            own, at = (reading.positions >= 0).nonzero(as_tuple=True)
            thoughts.remember(rows[own], at, found[own, at], count)
            return
        starts, ends = (chunk * chunks[rows, None] for chunks in (before, finished))
        new = starts + torch.arange(int((ends - starts).max()), device=ids.device)
        real, at = new < ends, (new + (count - lengths)[rows, None]).clamp(max=count - 1)
        counts = (ends - starts)[:, 0].tolist()
        with self._read_before.going_on(self._readers, rows.tolist(), counts):
            each = torch.arange(len(rows), device=ids.device)[:, None]
            source = None if embedded.mask_source is None else embedded.mask_source[each, at]
            part = embedded._replace(
                tokens=embedded.tokens[each, at],
                mask_source=source,
                ids=embedded.ids[each, at],
                visible=CAUSAL._replace(positions=self._read_before.positions(new.shape[1])),
            )
            found = self._backbone.think(part, None, self._read_before).last
        thoughts.remember(rows[:, None].expand_as(at)[real], at[real], found[real], count)
