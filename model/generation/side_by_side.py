"""Passes through a model of two decoders, each made for all targets at once that ask for its like."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.architectures.draft_and_verify.rollback import RollbackCache
from model.architectures.draft_and_verify.two_decoders import (
    ConsiderDraft,
    MakeDraft,
    Reads,
    ReadSource,
    SourceMemory,
    TwoDecoders,
    WriteOn,
    joined,
    padding_behind,
)
from model.generation.target import Asked, Consider, Fill, Follow, Read, Steps
from model.generation.texts import Drawn

MOST = 32
"""Targets side by side; the logits of all their places are held at once."""


class SideBySide:
    """Targets that are written together. Each may be at another place, and be of another length."""

    def __init__(self, model: TwoDecoders, count: int, capacity: int, device: torch.device) -> None:
        """Room for so many targets, of `capacity` tokens each."""
        self._model, self._device = model, device
        self._cache = RollbackCache(count, capacity, device)
        self._joined: dict[type[Asked], tuple[list[Reads], Reads]] = {}

    def step(self, targets: Mapping[int, Steps]) -> dict[int, Drawn | None]:
        """The next tokens of each target, by its number from 0; None where there are none left."""
        found: dict[int, Drawn | None] = {}
        asked: dict[int, Asked] = {}

        def go_on(number: int, answer: Any = None) -> None:
            try:
                said = targets[number].send(answer)
            except StopIteration:
                found[number] = None
                return
            if isinstance(said, Drawn):
                found[number] = said
            else:
                asked[number] = said

        for number in targets:
            go_on(number)
        while asked:
            kind = next(kind for kind in _MADE if any(isinstance(one, kind) for one in asked.values()))
            together = {number: asked.pop(number) for number in [*asked] if isinstance(asked[number], kind)}
            answers = _MADE[kind](self, [*together], [*together.values()])
            for number, answer in zip(together, answers, strict=True):
                go_on(number, answer)
        return found

    def _read(self, numbers: list[int], asked: list[Read]) -> list[SourceMemory]:
        ids = torch.nn.utils.rnn.pad_sequence([one.source for one in asked], batch_first=True)
        memories: list[SourceMemory] = self._model(ReadSource(ids, [len(one.source) for one in asked]))
        return memories

    def _consider(self, numbers: list[int], asked: list[Consider]) -> list[SourceMemory]:
        return [self._model(ConsiderDraft(one.memory, one.vectors)) for one in asked]

    def _fill(self, numbers: list[int], asked: list[Fill]) -> list[tuple[Tensor, Tensor]]:
        counts = [len(one.ids) for one in asked]
        rows = ([one.ids for one in asked], [one.hidden for one in asked])
        ids, hidden = (torch.nn.utils.rnn.pad_sequence(some, batch_first=True) for some in rows)
        wanted = self._places(max(counts), [(one.start, count) for one, count in zip(asked, counts, strict=True)])
        reads = self._reads(Fill, [one.memory.drafting for one in asked])
        padding = padding_behind(counts, self._device)
        logits, vectors = self._model(MakeDraft(reads, ids, hidden, wanted, padding))
        of_each = logits.split([count - one.start for one, count in zip(asked, counts, strict=True)])
        return [(own, vectors[row : row + 1, : counts[row]]) for row, own in enumerate(of_each)]

    def _follow(self, numbers: list[int], asked: list[Follow]) -> Sequence[Tensor]:
        counts = [len(one.ids) for one in asked]
        rows = [one.ids + [0] * (max(counts) - len(one.ids)) for one in asked]
        reads = []
        for number, one in zip(numbers, asked, strict=True):
            self._cache.truncate(number, one.held)
            assert one.memory.writing is not None, "nothing is written before the draft's vectors are there"
            reads.append(one.memory.writing)
        wanted = self._places(max(counts), [(len(one.ids) - one.last, len(one.ids)) for one in asked])
        ids = torch.tensor(rows, device=self._device)
        logits: Tensor = self._model(WriteOn(self._reads(Follow, reads), ids, self._cache, numbers, counts, wanted))
        return logits.split([one.last for one in asked])

    def _places(self, length: int, ranges: list[tuple[int, int]]) -> Tensor:
        """Numbers [n] of the places from first to end in each of rows of `length`, counted through all rows."""
        places = [place + row * length for row, (first, end) in enumerate(ranges) for place in range(first, end)]
        return torch.tensor(places, device=self._device)

    def _reads(self, kind: type[Asked], own: list[Reads]) -> Reads:
        """Side by side; done again only when it is of others."""
        known, together = self._joined.get(kind, ([], None))
        if together is not None and len(own) <= len(known):
            places = {id(one): place for place, one in enumerate(known)}
            rows = [places.get(id(one)) for one in own]
            if rows == [*range(len(known))]:
                return together
            if all(row is not None for row in rows):
                together = together.of([row for row in rows if row is not None])
                self._joined[kind] = own, together
                return together
        self._joined[kind] = own, joined(own)
        return self._joined[kind][1]


_MADE: dict[type[Asked], Any] = {
    Read: SideBySide._read,
    Consider: SideBySide._consider,
    Fill: SideBySide._fill,
    Follow: SideBySide._follow,
}
"""In the order in which they are made: a target that is behind catches up."""
