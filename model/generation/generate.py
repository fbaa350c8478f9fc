"""Texts from a model, whatever its decoding strategy: side by side, each as it would be alone."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.architectures.draft_and_verify.two_decoders import TwoDecoders
from model.architectures.token_model import TokenModel
from model.generation.decoding import decoding_of
from model.generation.sampling import Sampling
from model.generation.texts import Drawn, Texts
from model.generation.writing import Writing


class Generation:
    """Texts that grow side by side until they end."""

    def __init__(
        self,
        model: TokenModel,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        *,
        eos_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        decoding: str | None = None,
    ) -> None:
        """Texts that begin with `prompts`; nothing is computed yet.

        Args:
            model: in evaluation mode.
            prompts: [T0] int64 each, T0 >= 1, on the model's device.
            eos_id: ends a text; it is not given out.
            generators: source of each text's draws, on the model's device; torch's own unless given.
            decoding: the strategy's name; the architecture's usual one unless given.

        Raises:
            ConfigError: the model does not continue a text, or not in this way.
            ValueError: a prompt is empty.
        """
        self._decoding = decoding_of(model.config, decoding)(model, sampling)
        self._texts = Texts(prompts, generators)
        self._eos_id = eos_id
        self._ended: set[int] = set()
        self.drawn: list[Drawn] = []
        """By the last step, all texts at once; empty before the first."""

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """The next tokens of each text that goes on, by the number of its prompt; empty when all have ended.

        Of a text that ends with this step they are those before its end, if there are some.
        """
        rows = self._texts.leave(self._ended)
        if not self._texts.numbers:
            self.drawn = []
            return {}
        if rows is not None:
            self._decoding.keep(rows)
        drawn = self._decoding.step(self._texts)
        self.drawn = [drawn]
        self._texts.add(drawn.tokens)
        found = {}
        for number, tokens in zip(drawn.numbers, drawn.tokens.tolist(), strict=True):
            if self._eos_id in tokens:
                self.end(number)
                tokens = tokens[: tokens.index(self._eos_id)]
            if tokens:
                found[number] = tokens
        return found

    def end(self, text: int) -> None:
        """Compute no more of a text."""
        self._ended.add(text)

    def has_ended(self, text: int) -> bool:
        """By its own end token, or by `end`."""
        return text in self._ended


def generate(
    model: TokenModel,
    prompt_ids: Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue one prompt; see `Generation`, and `Writing` for a model that reads one sequence and writes another."""
    generators = None if generator is None else [generator]
    generation: Generation | Writing
    if isinstance(model, TwoDecoders):
        if eos_id is None:
            raise ValueError("a target begins with end-of-text: eos_id is needed")
        generation = Writing(model, [prompt_ids], sampling, eos_id=eos_id, generators=generators, continues=True)
    else:
        generation = Generation(model, [prompt_ids], sampling, eos_id=eos_id, generators=generators)
    left = max_new_tokens
    while left > 0:
        tokens = generation.step().get(0, [])[:left]
        yield from tokens
        left -= len(tokens)
        if generation.has_ended(0):
            return
