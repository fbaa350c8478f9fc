"""Texts from a model that reads one sequence and writes another: a source's target, or a text chunk by chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.architectures.draft_and_verify.two_decoders import TwoDecoders
from model.generation.drafting import WAYS, Drafting
from model.generation.sampling import Sampling
from model.generation.side_by_side import MOST, SideBySide
from model.generation.target import Passes, Steps, Target
from model.generation.texts import Drawn


class Writing:
    """Targets that are written side by side, each as it would be alone; used as `Generation` is."""

    def __init__(
        self,
        model: TwoDecoders,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        *,
        eos_id: int,
        drafting: Drafting | None = None,
        continues: bool,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: in evaluation mode.
            prompts: [T0] int64 each, T0 >= 1, on the model's device.
            eos_id: ends a target; it is not given out.
            drafting: the model's usual one unless given.
            continues: prompts go on, by chunks that each have the text up to there as their source; else each is a
                source, which ends with end-of-text.
            generators: source of each text's draws, on the model's device; torch's own unless given.

        Raises:
            ConfigError: the model does not write in this way.
            ValueError: a prompt is empty.
        """
        if not all(map(len, prompts)):
            raise ValueError("a prompt needs at least one token")
        self.drafting = drafting or Drafting("refine" if model.config.draft.refine else "verify")
        self.drafting.check(model.config)
        self._model, self._sampling, self._eos_id, self._continues = model, sampling, eos_id, continues
        self.passes = [Passes() for _ in prompts]
        chances: Sequence[torch.Generator | None] = generators or [None] * len(prompts)
        sources = enumerate(zip(prompts, chances, strict=True))
        self._steps = [self._written(number, ids, generator) for number, (ids, generator) in sources]
        self._sides = [
            SideBySide(model, min(MOST, len(prompts) - first), self._most, prompts[0].device)
            for first in range(0, len(prompts), MOST)
        ]
        self._ended: set[int] = set()
        self.cut: set[int] = set()
        """Texts that have ended without an end token: there was no room, or a draft had none."""
        self.drawn: list[Drawn] = []
        """By the last step, of a text each; empty before the first."""

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """As `Generation.step`; texts get as many tokens as each has become certain of."""
        self.drawn = []
        found = {}
        for number, drawn in self._next().items():
            if drawn is None:
                self.end(number)
                self.cut.add(number)
                continue
            self.drawn.append(drawn._replace(numbers=[number]))
            tokens = drawn.tokens[0].tolist()
            if tokens[-1] == self._eos_id:
                self.end(number)
                tokens.pop()
            if tokens:
                found[number] = tokens
        return found

    def _next(self) -> dict[int, Drawn | None]:
        """What comes next of each text that has not ended."""
        found: dict[int, Drawn | None] = {}
        for first, side in zip(range(0, len(self._steps), MOST), self._sides, strict=True):
            own = {
                place: steps
                for place, steps in enumerate(self._steps[first : first + MOST])
                if first + place not in self._ended
            }
            found |= {first + place: drawn for place, drawn in side.step(own).items()}
        return found

    @property
    def _most(self) -> int:
        """Tokens of a target."""
        return self._model.config.chunk if self._continues else self._model.config.context

    def end(self, text: int) -> None:
        """Compute no more of a text."""
        self._ended.add(text)

    def has_ended(self, text: int) -> bool:
        """By its own end token, since there is no room for more, or by `end`."""
        return text in self._ended

    def _written(self, number: int, ids: Tensor, generator: torch.Generator | None) -> Steps:
        if not self._continues:
            ids = ids if ids[-1] == self._eos_id else torch.cat([ids, ids.new_tensor([self._eos_id])])
            ids = ids[: self._model.config.context]  # as sources are cut in training
        while True:
            target = Target(
                self._model,
                ids,
                self._sampling,
                self._eos_id,
                passes=self.passes[number],
                generator=generator,
                before=ids.tolist() if self._continues else (),
                most=self._most,
            )
            yield from target.read()
            yield from WAYS[self.drafting.decode](target, self.drafting)
            if not self._continues:
                return
            ids = torch.cat([ids, ids.new_tensor(target.done)])
