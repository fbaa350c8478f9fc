"""One target under way: what is written of it, the passes that were made for it, and the draws."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from model.architectures.draft_and_verify.two_decoders import SourceMemory, TwoDecoders
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


class Read(NamedTuple):
    """A pass that a target asks for: read the source [S] int64. Gives its `SourceMemory`."""

    source: Tensor


class Consider(NamedTuple):
    """Read a draft's vectors [1, L, C], too. Gives a `SourceMemory`."""

    memory: SourceMemory
    vectors: Tensor


class Fill(NamedTuple):
    """Draft hidden places. Gives logits [L - start, V] of those from `start` on, and vectors [1, L, C] of all."""

    memory: SourceMemory
    ids: Tensor
    """[L] int64."""
    hidden: Tensor
    """[L] bool."""
    start: int


class Follow(NamedTuple):
    """Write on. Gives logits [n, V] of the token behind each of the last n of `ids`."""

    memory: SourceMemory
    ids: list[int]
    held: int
    """Tokens before them, that were read and stay."""
    last: int
    """n."""


Asked = Read | Consider | Fill | Follow
Steps = Generator[Asked | Drawn, Any, None]
"""Tokens of a target as they become certain, and the passes that it asks for, whose results are sent."""
Found = TypeVar("Found")
Asking = Generator[Asked, Any, Found]
"""What is found by passes."""


class Target:
    """What a model of two decoders writes for one source; passes are asked for, so that they can be made for many."""

    def __init__(
        self,
        model: TwoDecoders,
        source: Tensor,
        sampling: Sampling,
        eos_id: int,
        *,
        passes: Passes,
        generator: torch.Generator | None = None,
        before: Sequence[int] = (),
        most: int,
    ) -> None:
        """Of a source [S] int64 the last `context` tokens are seen.

        Args:
            passes: where they are counted.
            before: tokens that count as written for the repetition penalty.
            most: tokens of a target, at most the context.
        """
        self.model, self.sampling, self.eos_id = model, sampling, eos_id
        self.generator, self.device = generator, source.device
        self.capacity = most
        self.done: list[int] = []
        self.passes = passes
        self._source = source[-model.config.context :]
        self._memory: SourceMemory | None = None
        self._held = 0
        assert model.config.vocab_size is not None
        self._present = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=source.device)
        self._present[list(before)] = True

    def read(self) -> Asking[None]:
        """The source; comes first."""
        self.passes.encoder += 1
        self._memory = yield Read(self._source)

    @property
    def memory(self) -> SourceMemory:
        """Of the source."""
        assert self._memory is not None
        return self._memory

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

    def present(self, tokens: Sequence[int] = ()) -> Tensor | None:
        """What was there before each of `tokens`, which come behind what is written, and after the last: [n + 1, V].

        None where that changes nothing.
        """
        if not self.sampling.penalises:
            return None
        held = self._present.clone()
        held[self.done] = True
        rows = [held]
        for token in tokens:
            held = held.clone()
            held[token] = True
            rows.append(held)
        return torch.stack(rows)

    def draft(self, shown: Sequence[int], length: int) -> Asking[tuple[Tensor, Tensor]]:
        """Logits [length - start, V] of a target whose first tokens, `start` of them, are shown, and its vectors."""
        start = len(shown)
        ids = torch.tensor([*shown, *[0] * (length - start)], device=self.device)
        return self.fill(ids, torch.arange(length, device=self.device) >= start, start)

    def fill(self, ids: Tensor, hidden: Tensor, start: int = 0) -> Asking[tuple[Tensor, Tensor]]:
        """The same of any hidden places [L] bool of ids [L]."""
        self.passes.drafts += 1
        found: tuple[Tensor, Tensor] = yield Fill(self.memory, ids, hidden, start)
        return found

    def consider(self, vectors: Tensor) -> Asking[None]:
        """What is written from now on is written with a draft's vectors [1, L, C] in view."""
        self._memory = yield Consider(self.memory, vectors)

    def following(self, tokens: Sequence[int] = ()) -> Asking[Tensor]:
        """Logits of the token behind what is written, and behind each of more `tokens`: [n + 1, V], if there is room.

        What is not known to stay is forgotten by the next call.
        """
        length = min(self._held, len(self.done))
        ids = [self.eos_id, *self.done, *tokens][length : self.capacity]
        self.passes.writes += 1
        self._held = length + len(ids)
        logits: Tensor = yield Follow(self.memory, ids, length, self._held - len(self.done))
        return logits

    def probabilities(self, logits: Tensor, present: Tensor | None) -> Tensor:
        """What each token is drawn from, [n, V]: at temperature 0 the likeliest alone."""
        return self.sampling.probabilities(logits, present)

    def likeliest(self, logits: Tensor, present: Tensor | None) -> list[int]:
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
        return Drawn([0], ids, logits[None, :count], None if present is None else present[None], proposals)
