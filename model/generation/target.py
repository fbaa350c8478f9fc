"""One target under way: what is written of it, the passes that were made for it, and the draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.architectures.draft_and_verify.rollback import RollbackCache
from model.architectures.draft_and_verify.two_decoders import (
    ConsiderDraft,
    MakeDraft,
    ReadSource,
    TwoDecoders,
    WriteOn,
)
from model.generation.sampling import Sampling
from model.generation.texts import Drawn

NO_DRAFT = -1
"""In the place of a token that a draft proposed: none did."""


@dataclass
class Passes:
    """Forward passes through each part of a model."""

    encoder: int = 0
    drafts: int = 0
    writes: int = 0
    """Of the decoder that writes token by token; over as many tokens at once as are known."""

    def __add__(self, other: "Passes") -> "Passes":
        """Of both."""
        return Passes(self.encoder + other.encoder, self.drafts + other.drafts, self.writes + other.writes)


class Target:
    """What a model of two decoders writes for one source."""

    def __init__(
        self,
        model: TwoDecoders,
        source: Tensor,
        sampling: Sampling,
        eos_id: int,
        *,
        generator: torch.Generator | None = None,
        before: Sequence[int] = (),
        most: int,
    ) -> None:
        """Read the source [S] int64, of which the last `context` tokens are seen.

        Args:
            before: tokens that count as written for the repetition penalty.
            most: tokens of a target, at most the context.
        """
        self.model, self.sampling, self.eos_id = model, sampling, eos_id
        self.generator, self.device = generator, source.device
        self.capacity = most
        self.done: list[int] = []
        self.passes = Passes(encoder=1)
        self.memory = model(ReadSource(source[-model.config.context :][None]))
        self._cache = RollbackCache(self.capacity, source.device)
        assert model.config.vocab_size is not None
        self._present = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=source.device)
        self._present[list(before)] = True

    @property
    def ended(self) -> bool:
        """By end-of-text, or since there is no room for more."""
        return len(self.done) == self.capacity or (bool(self.done) and self.done[-1] == self.eos_id)

    def length(self, more_than: int = 0) -> int:
        """The likeliest of the whole, of those above `more_than`."""
        return more_than + 1 + int(self.memory.lengths[more_than : self.capacity].argmax())

    def lengths(self, count: int) -> list[int]:
        """The likeliest, from the likeliest on."""
        found: list[int] = (self.memory.lengths[: self.capacity].topk(min(count, self.capacity)).indices + 1).tolist()
        return found

    def present(self, tokens: Sequence[int]) -> Tensor:
        """What was there before each of `tokens`, which come behind what is written, and after the last: [n + 1, V]."""
        held = self._present.clone()
        held[self.done] = True
        rows = [held]
        for token in tokens:
            held = held.clone()
            held[token] = True
            rows.append(held)
        return torch.stack(rows)

    def draft(self, shown: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """Logits [length - start, V] of a target whose first tokens, `start` of them, are shown, and its vectors."""
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        start = len(shown)
        ids[0, :start] = torch.tensor(shown, dtype=torch.int64, device=self.device)
        hidden = torch.arange(length, device=self.device)[None] >= start
        return self.fill(ids, hidden, start)

    def fill(self, ids: Tensor, hidden: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """The same of any hidden places [1, L] bool of ids [1, L]."""
        self.passes.drafts += 1
        found: tuple[Tensor, Tensor] = self.model(MakeDraft(self.memory, ids, hidden, start))
        return found

    def consider(self, vectors: Tensor) -> None:
        """What is written from now on is written with a draft's vectors [1, L, C] in view."""
        self.memory = self.model(ConsiderDraft(self.memory, vectors))

    def following(self, tokens: Sequence[int] = ()) -> Tensor:
        """Logits of the token behind what is written, and behind each of more `tokens`: [n + 1, V].

        What is not known to stay is forgotten by the next call.
        """
        length = min(self._cache.length, len(self.done))
        self._cache.truncate(length)
        on_end = [self.eos_id, *self.done, *tokens]
        ids = torch.tensor([on_end[length : self.capacity]], device=self.device)
        self.passes.writes += 1
        logits: Tensor = self.model(WriteOn(self.memory, ids, self._cache))
        return logits[len(self.done) - length :]

    def probabilities(self, logits: Tensor, present: Tensor) -> Tensor:
        """What each token is drawn from, [n, V]: at temperature 0 the likeliest alone."""
        return self.sampling.probabilities(logits, present)

    def likeliest(self, logits: Tensor, present: Tensor) -> list[int]:
        """Of each place."""
        found: list[int] = self.sampling.likeliest(logits, present).tolist()
        return found

    def draw(self, probabilities: Tensor) -> int:
        """The number of one of probabilities [n]: all that is random here."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def add(self, tokens: Sequence[int], logits: Tensor, drafts: Sequence[int] | None = None) -> Drawn:
        """Write tokens, n of them, with the logits [n, V] that they are judged by and what a draft proposed."""
        if self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id) + 1]
        tokens = tokens[: self.capacity - len(self.done)]
        count = len(tokens)
        present = self.present(tokens[:-1])
        self.done += tokens
        proposed = [NO_DRAFT] * count if drafts is None else list(drafts[:count])
        proposed += [NO_DRAFT] * (count - len(proposed))
        ids, proposals = (torch.tensor([some], device=self.device) for some in (tokens, proposed))
        return Drawn([0], ids, logits[None, :count], present[None], proposals)


Steps = Iterator[Drawn]
"""Tokens of a target as they become certain."""
