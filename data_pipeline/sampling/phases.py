"""Phases of a run's data: which source has its turn at which position, decided by counts alone."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from data_pipeline.errors import DataError
from data_pipeline.sampling.mixture import Mixture
from data_pipeline.sampling.shuffle import Permutation


class Phase(BaseModel, frozen=True, extra="forbid"):
    """From `start` on, samples are drawn in this way, until the next phase. Sources go by name."""

    start: int = 0
    """Sample position in the run."""
    base_counts: dict[str, int]
    """Samples of each source that were drawn before `start`."""
    weights: dict[str, int]
    """Integer weights of the sources that are mixed."""
    caps: dict[str, int] = {}
    """Samples that a source gives at most, those before this phase included."""
    exhausted: Literal["stop", "drop"] = "stop"
    """When a source has given its last: the data end, or it is left out and the others keep their proportions."""
    context: int
    """Predicted tokens of a sample."""
    unit: int
    """Tokens of the windows that the order permutes: the context at which this way of counting began."""
    order: Literal["global", "block"] = "global"
    packing: Literal["plain", "best_fit", "pairs", "labels"] = "plain"
    """What a window holds: text as it comes, documents that share it, or a pair of source and target."""
    streams: dict[str, str]
    """Fingerprint of each source's tokens, and of how they are packed: keys their order."""

    def changes(self, other: "Phase") -> list[str]:
        """What `other` would do differently, as `key: here, then there`; where the two stand makes no difference."""
        mine, theirs = self._described(), other._described()
        return [
            f"{key}: {mine.get(key, 'nothing')}, now {theirs.get(key, 'nothing')}"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        ]

    def _described(self) -> dict[str, Any]:
        flat: dict[str, Any] = {"context": self.context, "data.order": self.order, "data.packing": self.packing}
        if self.caps:
            flat["exhausted"] = self.exhausted
        total = sum(self.weights.values())
        flat |= {f"weight of {name}": f"{weight}/{total}" for name, weight in self.weights.items()}
        flat |= {f"most samples of {name}": cap for name, cap in self.caps.items()}
        return flat | {f"tokens of {name}": stream[:12] for name, stream in self.streams.items()}


@dataclass(frozen=True)
class _Segment:
    """Positions from `start` on share a mixture; sources by their number in the phase."""

    start: int
    sources: np.ndarray
    base: np.ndarray
    """Samples of each of the phase's sources before `start`, int64 [K]."""
    mixture: Mixture

    def counts(self, position: int) -> np.ndarray:
        counts = self.base.copy()
        counts[self.sources] += self.mixture.counts(position - self.start)
        return counts


class Schedule:
    """The turns of the sources in one phase, from its start to the end of the data, if they end.

    Where a source has given all it may, a segment ends: with it the data (`stop`), or the source is left out (`drop`).
    """

    def __init__(self, phase: Phase, seed: int) -> None:
        """`seed` of the run."""
        self.phase = phase
        self.names = list(phase.weights)
        self.end: int | None = None
        """First position without a sample, once `extend` has come across it."""
        self._caps = [phase.caps.get(name) for name in self.names]
        self._seed = seed
        self._segments: list[_Segment] = []
        base = np.array([phase.base_counts[name] for name in self.names], np.int64)
        self._next: tuple[int, np.ndarray] | None = (phase.start, base)
        self._spent = base

    def extend(self, position: int) -> int:
        """Works out the segments before `position`; returns it, or the end of the data if that comes first."""
        while self._next is not None and self._next[0] < position:
            start, base = self._next
            sources = [k for k, cap in enumerate(self._caps) if cap is None or base[k] < cap]
            if not sources or (len(sources) < len(self._caps) and self.phase.exhausted == "stop"):
                self.end, self._next, self._spent = start, None, base
                break
            mixture = Mixture([self.phase.weights[self.names[k]] for k in sources])
            segment = _Segment(start, np.array(sources), base, mixture)
            self._segments.append(segment)
            # A source ends where its turn comes and it has no more to give.
            ends = [
                mixture.slot_of(number, cap - int(base[k]))
                for number, k in enumerate(sources)
                if (cap := self._caps[k]) is not None
            ]
            self._next = (start + min(ends), segment.counts(start + min(ends))) if ends else None
        return position if self.end is None else min(position, self.end)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source whose turn it is, and how many samples it gave before: int64 [n] to int64 [n] each.

        Raises DataError for positions behind the end of the data.
        """
        self.check(int(positions.max()) + 1)
        source, count = np.empty_like(positions), np.empty_like(positions)
        segment_of = np.searchsorted([segment.start for segment in self._segments], positions, "right") - 1
        for number in np.unique(segment_of).tolist():
            segment, rows = self._segments[number], segment_of == number
            local, rank = segment.mixture.at(positions[rows] - segment.start)
            source[rows] = segment.sources[local]
            count[rows] = segment.base[source[rows]] + rank
        return source, count

    def share(self, firsts: np.ndarray, global_batch: int, rank: int, world_size: int) -> np.ndarray:
        """The positions that a rank reads of batches that begin at `firsts`: int64 [S] to [S, global_batch/world_size].

        One source: each world_size-th from the rank-th on. Several: so after a permutation of each batch, lest a
        period of the mixture should meet the number of ranks and give a rank one source only.
        """
        index = np.broadcast_to(np.arange(rank, global_batch, world_size), (len(firsts), global_batch // world_size))
        if len(self.names) > 1:
            shuffle = Permutation(f"{self._seed}:batch", global_batch)
            index = shuffle(index.ravel(), np.repeat(firsts, index.shape[1])).reshape(index.shape)
        return index + firsts[:, None]

    def counts(self, position: int) -> dict[str, int]:
        """How many samples each source has given before `position`; those without a weight included."""
        self.check(position)
        last = [segment for segment in self._segments if segment.start < position][-1:]
        counts = last[0].counts(position) if last else np.array([self.phase.base_counts[name] for name in self.names])
        return self.phase.base_counts | dict(zip(self.names, counts.tolist(), strict=True))

    def dropped(self, position: int) -> list[tuple[int, list[str]]]:
        """Where sources were left out before `position`, and which."""
        self.extend(position)
        segments = [segment for segment in self._segments if segment.start < position]
        return [
            (after.start, [self.names[k] for k in before.sources.tolist() if k not in after.sources])
            for before, after in itertools.pairwise(segments)
        ]

    def check(self, position: int) -> None:
        """Raises DataError unless the data last until `position`."""
        if self.extend(position) < position:
            raise self._exhausted()

    def _exhausted(self) -> DataError:
        spent = [
            f"{name} {cap}"
            for name, cap, count in zip(self.names, self._caps, self._spent.tolist(), strict=True)
            if cap is not None and count >= cap
        ]
        return DataError(
            f"the data end at sample {self.end} of the run ({self.phase.context} tokens each): these sources have "
            f"given all samples that data.sources.NAME.repeat allows: {', '.join(spent)}. Train fewer steps, raise it, "
            "or set data.exhausted=drop to go on without them"
        )
