"""Where a run stands in its data: a position, and what each stretch of positions means. The same on all ranks."""

from typing import Any, Literal, Self

from pydantic import BaseModel, model_validator

from data_pipeline.errors import DataError
from data_pipeline.sampling.phases import Phase, Schedule


class DataState(BaseModel, frozen=True):
    """Advanced by the trainer when a step is done, saved with each checkpoint. Below 1 KB for a handful of sources."""

    format: Literal[2] = 2
    fingerprint: str
    """Of the dataset."""
    seed: int
    samples_seen: int = 0
    tokens_seen: int = 0
    phases: tuple[Phase, ...] = ()
    """In order of `start`; none until the run takes its first step, and in states of format 1."""

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, content: Any) -> Any:
        """Format 1 knew one stream, in global order, and no phases: what it holds means the same here."""
        if isinstance(content, dict) and content.get("format") == 1:
            return {**content, "format": 2, "phases": ()}
        return content

    def after(self, samples: int, tokens: int) -> Self:
        """The state once `samples` more samples of `tokens` predicted tokens in all are trained on.

        Samples that are to be skipped count as seen, with 0 tokens.
        """
        seen = {"samples_seen": self.samples_seen + samples, "tokens_seen": self.tokens_seen + tokens}
        return self.model_copy(update=seen)

    def check(self, fingerprint: str) -> None:
        """Raises DataError unless `fingerprint` is the one this state counts on."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"the dataset changed: the run was trained on {self.fingerprint[:12]}, data.path now holds "
                f"{fingerprint[:12]}. Restore that dataset, or start a new run from the checkpoint"
            )

    def phase_at(self, position: int) -> Phase:
        """The phase that a sample position belongs to. Raises DataError if there is none yet."""
        for phase in reversed(self.phases):
            if phase.start <= position:
                return phase
        raise DataError(f"the state does not say how sample {position} was drawn: it is of an older version of duet")

    def entered(self, wanted: Phase, fingerprint: str, declared: int) -> Self:
        """The state from which a run goes on as `wanted` says: this one, or one with a phase more.

        Args:
            wanted: its `start` and `base_counts` are filled in here.
            fingerprint: of the dataset that is there now.
            declared: the number of the phase that the user means to be in, from 1 (`data.phase`).

        Raises:
            DataError: data, weights, order or context differ and no new phase was declared; names what differs.
        """
        if not self.phases:
            self._check_first(wanted, fingerprint, declared)
            return self.model_copy(update={"phases": (wanted,)})
        now, number = self.phases[-1], len(self.phases)
        changes = now.changes(wanted)
        if fingerprint != self.fingerprint:
            changes.insert(0, f"dataset: {self.fingerprint[:12]}, now {fingerprint[:12]}")
        if declared == number and not changes:
            return self
        if declared != number + 1:
            raise DataError(_explain(self, number, declared, changes))
        counts = Schedule(now, self.seed).counts(self.samples_seen)
        phase = wanted.model_copy(
            update={
                "start": self.samples_seen,
                "base_counts": {name: _carried(name, now, wanted, counts.get(name, 0)) for name in wanted.streams},
                "unit": now.unit if _divides(wanted, now) else wanted.context,
            }
        )
        return self.model_copy(update={"fingerprint": fingerprint, "phases": (*self.phases, phase)})

    def _check_first(self, wanted: Phase, fingerprint: str, declared: int) -> None:
        if self.samples_seen:  # of format 1
            self.check(fingerprint)
            if len(wanted.weights) > 1 or wanted.order != "global" or wanted.caps:
                raise DataError(
                    "this run began with an older version of duet, which read one stream in global order: go on "
                    "without data.weights, repeats and data.order; a later start can change them in a new phase"
                )
        if declared != 1:
            raise DataError(f"this run is in phase 1 of its data; data.phase={declared} is not its number")


def _explain(state: DataState, number: int, declared: int, changes: list[str]) -> str:
    where = f"this run is in phase {number} of its data, at sample {state.samples_seen}"
    if not changes:
        return f"{where}: data.phase={declared} is neither its number nor the next one's"
    return (
        f"{where}, and what it is to read changed: {'; '.join(changes)}. Restore that, or go on with the change in a "
        f"new phase: data.phase={number + 1}"
    )


def _divides(wanted: Phase, now: Phase) -> bool:
    """Whether windows of `now` are so many whole windows of `wanted`; packed windows are only if they are the same."""
    if (now.packing, wanted.packing) != ("plain", "plain"):
        return (now.packing, now.context) == (wanted.packing, wanted.context)
    return now.unit % wanted.context == 0


def _carried(name: str, now: Phase, wanted: Phase, count: int) -> int:
    """Samples of a source that count as drawn when `wanted` follows `now`; a source with other tokens, or packed
    otherwise, begins anew."""
    if now.streams.get(name) != wanted.streams[name]:
        return 0
    if now.packing == wanted.packing and now.packing in ("pairs", "labels"):  # which are the same whatever the context
        return count
    if _divides(wanted, now) and count * now.context % wanted.context == 0:
        return count * now.context // wanted.context
    if count == 0:
        return 0
    raise DataError(
        f"context {wanted.context} does not divide {now.unit}, over which the windows of source {name} are permuted: "
        f"after {count} samples of it, what was read cannot be told from what was not. Use a context that divides it, "
        "or start a new run"
    )
