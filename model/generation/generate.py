"""Texts from a model, one token after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.architectures.token_model import TokenModel
from model.attention.cache import Cache
from model.config.model_config import ModelConfig
from model.generation.sampling import Sampling


class Drawn(NamedTuple):
    """What a step of texts side by side has drawn, and from what."""

    texts: list[int]
    """Numbers of the B prompts."""
    tokens: Tensor
    """[B] int64, the end token included."""
    logits: Tensor
    """[B, V]."""
    present: Tensor
    """[B, V] bool, tokens that each text held."""


class Generation:
    """Texts that grow side by side, each as it would alone.

    The model reads each token once, into a `Cache`. When the longest text no longer fits the model's context, its last
    `context` tokens are the window, which is read anew for every token: vectors know their distance from its start, so
    none of them can be kept. Of an architecture without a cache (`Traits.cached`) it is so from the start.
    """

    def __init__(
        self,
        model: TokenModel,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        *,
        eos_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        """Texts that begin with `prompts`; nothing is computed yet.

        Args:
            model: in evaluation mode.
            prompts: [T0] int64 each, T0 >= 1, on the model's device.
            eos_id: ends a text; it is not given out.
            generators: source of each text's draws, on the model's device; torch's own unless given.

        Raises:
            ConfigError: the model is not causal, so it does not continue a text.
            ValueError: a prompt is empty.
        """
        check_continues(model.config)
        if not all(map(len, prompts)):
            raise ValueError("a prompt needs at least one token")
        self._model = model
        self._sampling = sampling
        self._eos_id = eos_id
        self._texts = list(range(len(prompts)))
        self._generators: Sequence[torch.Generator | None] = generators or [None] * len(prompts)
        longest = max(map(len, prompts), default=0)
        # A text's own first token fills its row, so that the row holds no token that the text does not.
        rows = [torch.cat([prompt[:1].expand(longest - len(prompt)), prompt]) for prompt in prompts]
        self._ids = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
        self._padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._ids.device)
        self._cache: Cache | None = None
        self._ended: set[int] = set()
        self.drawn: Drawn | None = None
        """By the last step; None before the first."""

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """The next token of each text that goes on, by the number of its prompt; empty when all have ended."""
        self._leave_ended()
        if not self._texts:
            return {}
        logits = self._logits()
        present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, self._ids, True)
        tokens = self._sampling.draw(logits, present, self._generators)
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self.drawn = Drawn(self._texts, tokens, logits, present)
        found = dict(zip(self._texts, tokens.tolist(), strict=True))
        self._ended |= {text for text, token in found.items() if token == self._eos_id}
        return {text: token for text, token in found.items() if text not in self._ended}

    def end(self, text: int) -> None:
        """Compute no more of a text."""
        self._ended.add(text)

    def _logits(self) -> Tensor:
        context, length = self._model.config.context, self._ids.shape[1]
        if not self._model.config.traits.cached:  # alone, since what it makes of padding is not known
            rows = zip(self._ids, self._padding.tolist(), strict=True)
            return torch.cat([self._model(row[padding:][-context:][None])[:, -1] for row, padding in rows])
        if self._cache is not None and length <= context:
            return self._cache.logits(self._model, self._ids[:, -1:])
        hidden = max(0, length - context)
        self._cache = Cache((self._padding - hidden).clamp(min=0), context)
        return self._cache.logits(self._model, self._ids[:, hidden:])

    def _leave_ended(self) -> None:
        stay = [row for row, text in enumerate(self._texts) if text not in self._ended]
        if len(stay) == len(self._texts):
            return
        rows = torch.tensor(stay, dtype=torch.int64, device=self._ids.device)
        self._texts = [self._texts[row] for row in stay]
        self._generators = [self._generators[row] for row in stay]
        self._ids, self._padding = self._ids[rows], self._padding[rows]
        if self._cache is not None:
            self._cache.reorder(rows)


def generate(
    model: TokenModel,
    prompt_ids: Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue one prompt; see `Generation`."""
    generators = None if generator is None else [generator]
    generation = Generation(model, [prompt_ids], sampling, eos_id=eos_id, generators=generators)
    for _ in range(max_new_tokens):
        found = generation.step()
        if not found:
            return
        yield found[0]


def check_continues(config: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot continue a prompt."""
    if not config.causal:
        raise ConfigError(config.traits.why_not_continued)
