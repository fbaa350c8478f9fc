"""One token after the other, each from all before it."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.generation.one_token import OneToken
from model.generation.sampling import Sampling
from model.generation.texts import Drawn, Texts


class Autoregressive:
    """The model reads each token once, into a `Cache`. When the longest text no longer fits the model's context, its
    last `context` tokens are the window, which is read anew for every token: vectors know their distance from its
    start, so none of them can be kept. Of an architecture without a cache (`Traits.cached`) it is so from the start.
    """

    def __init__(self, model: TokenModel, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._cache: Cache | None = None
        self._further: Callable[[Tensor], Tensor] | None = None
        """Logits [B, V] of the token after those [B, 1] that come after what the cache holds."""

    def step(self, texts: Texts) -> Drawn:
        """The next token of each text."""
        logits = self._logits(texts)
        present = None
        if self._sampling.penalises:
            present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, texts.ids, True)
        tokens = self._sampling.draw(logits, present, texts.generators)
        return Drawn(texts.numbers, tokens[:, None], logits[:, None], None if present is None else present[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the texts, [B'] int64."""
        if self._cache is not None:
            self._cache.reorder(rows)

    def _logits(self, texts: Texts) -> Tensor:
        context, length = self._model.config.context, texts.ids.shape[1]
        if not self._model.config.traits.cached:  # alone, since what it makes of padding is not known
            rows = zip(texts.ids, texts.padding.tolist(), strict=True)
            return torch.cat([self._model(row[padding:][-context:][None])[:, -1] for row, padding in rows])
        if self._cache is not None and length <= context:
            if self._further is None:
                self._further = OneToken.of(self._model, self._cache)
            return self._further(texts.ids[:, -1:])
        hidden = max(0, length - context)
        self._further = None
        self._cache = Cache((texts.padding - hidden).clamp(min=0), context)
        return self._cache.logits(self._model, texts.ids[:, hidden:])
