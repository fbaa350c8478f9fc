"""Texts that a model continues: their pieces as they grow, and, where asked for, what each token was drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.generation.generate import Generation
from model.generation.inspection import score
from model.generation.sampling import Sampling
from model.generation.texts import Drawn
from pretrain.inference.text import GrowingText, check_text
from pretrain.inference.trained import Trained

LIKELIEST = 5
"""Tokens that are told beside each one."""


@dataclass(frozen=True)
class Settings:
    """Sampling, lengths, stops and seed of a continuation."""

    sampling: Sampling
    tokens: int = 200
    """At most, for each text."""
    stops: tuple[str, ...] = ()
    """A text ends before the first of them that it holds."""
    seed: int = 0
    """Text number n draws from seed + n."""


class Token(NamedTuple):
    """What was drawn, or what a prompt holds, and how likely it was; None where the model did not predict it."""

    id: int
    log_probability: float | None = None
    """In nats, under the model at temperature 1."""
    sampling_log_probability: float | None = None
    """Under what it was drawn from; 0 where the likeliest is always taken."""
    rank: int | None = None
    """Among all tokens under the model, from 1."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The first ranks: tokens and their log-probabilities."""


@dataclass
class Text:
    """A prompt and its continuation."""

    prompt: str
    prompt_ids: list[int]
    """The end token alone where the prompt is empty."""
    growing: GrowingText
    continuation: str = ""
    """As shown: it ends before a stop string."""
    drawn: list[Token] = field(default_factory=list)
    """Those of a stop string included; only where recorded."""
    finish: Literal["stop", "end", "length"] = "length"
    """Why it ended: a stop string, the end token, or there were enough tokens."""


class Continuation:
    """Prompts continued side by side, each as it would be alone."""

    def __init__(
        self,
        trained: Trained,
        prompts: Sequence[str],
        settings: Settings,
        *,
        recorded: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            trained: its model goes to the GPU if there is one.
            recorded: keep of each token how likely it was.

        Raises:
            ConfigError: the model was not trained to continue a text, a stop string is empty, or one is no UTF-8.
        """
        trained.check_continues()
        self.settings = settings
        self._recorded = recorded
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = trained.tokenizer
        texts = [check_text(prompt, "a prompt") for prompt in prompts]
        encoded = [ids.tolist() if len(ids) else [tokenizer.eos_id] for ids in tokenizer.encode(texts)]
        self.texts = [
            Text(prompt, ids, GrowingText(tokenizer.decode, settings.stops, ids))
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        self._generation = Generation(
            trained.model.to(device),
            [torch.tensor(ids, device=device) for ids in encoded],
            settings.sampling,
            eos_id=tokenizer.eos_id,
            generators=[torch.Generator(device).manual_seed(settings.seed + number) for number in range(len(prompts))],
        )

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(number of the text, piece of it) as soon as a piece is certain; without the prompts."""
        going, left = list(range(len(self.texts))), self.settings.tokens
        while going and left > 0:
            found = self._generation.step()
            drawn = self._generation.drawn
            assert drawn is not None
            records = recorded(drawn, self.settings.sampling) if self._recorded else {}
            for number in going:
                yield from self._grown(number, found.get(number, [])[:left], records.get(number, []))
            going = [number for number in going if not self._generation.has_ended(number)]
            left -= drawn.tokens.shape[1]
        for number, text in enumerate(self.texts):
            yield self._shown(number, text.growing.finish())

    def _grown(self, number: int, tokens: list[int], records: list[Token]) -> Iterator[tuple[int, str]]:
        """A text with the tokens of a step before its end; `records`: of all that were drawn, if they are recorded."""
        text = self.texts[number]
        for place, token in enumerate(tokens):
            text.drawn += records[place : place + 1]
            yield self._shown(number, text.growing.add(token))
            if text.growing.ended:
                text.finish = "stop"
                self._generation.end(number)
                return
        if self._generation.has_ended(number):
            text.finish = "end"

    def _shown(self, number: int, piece: str) -> tuple[int, str]:
        self.texts[number].continuation += piece
        return number, piece


def recorded(drawn: Drawn, sampling: Sampling) -> dict[int, list[Token]]:
    """How likely each token of a step was, by the number of its text."""
    sampled = torch.zeros_like(drawn.tokens, dtype=torch.float32)
    if sampling.temperature:
        probabilities = sampling.probabilities(drawn.logits, drawn.present)
        sampled = probabilities.gather(-1, drawn.tokens[..., None])[..., 0].log()
    return {
        number: [
            token._replace(sampling_log_probability=own)
            for token, own in zip(scored(tokens, logits), owns, strict=True)
        ]
        for number, tokens, logits, owns in zip(
            drawn.numbers, drawn.tokens, drawn.logits, sampled.tolist(), strict=True
        )
    }


def scored(ids: Tensor, logits: Tensor) -> list[Token]:
    """Tokens [T] with how likely they were by the logits [T, V] that predict them."""
    found = score(logits, ids, LIKELIEST)
    columns = (ids, found.log_probability, found.rank, found.likeliest, found.likeliest_log_probability)
    return [
        Token(token, log_probability, None, rank, tuple(zip(others, theirs, strict=True)))
        for token, log_probability, rank, others, theirs in zip(*(c.tolist() for c in columns), strict=True)
    ]
