"""Texts that a model continues: their pieces as they grow, and, where asked for, what each token was drawn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.ingest.readers import Message
from model.architectures.draft_and_verify.two_decoders import TwoDecoders
from model.generation.drafting import Drafting
from model.generation.generate import Generation
from model.generation.inspection import score
from model.generation.sampling import Sampling
from model.generation.target import NO_DRAFT, Passes
from model.generation.texts import Drawn
from model.generation.writing import Writing
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
    drafting: Drafting | None = None
    """Of a model that drafts: how it writes; its usual way unless given."""


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
    draft: int | None = None
    """What a draft proposed in its place; where it is another token, that was corrected."""


@dataclass
class Text:
    """A prompt and its continuation."""

    prompt: str
    prompt_ids: list[int]
    """The end token alone where the prompt is empty."""
    growing: GrowingText
    continuation: str = ""
    """As shown: it ends before a stop string."""
    num_tokens: int = 0
    """Drawn, those of a stop string included."""
    drawn: list[Token] = field(default_factory=list)
    """Those of a stop string included; only where recorded."""
    finish: Literal["stop", "end", "length"] = "length"
    """Why it ended: a stop string, the end token, or there were enough tokens."""
    messages: tuple[Message, ...] = ()
    """Of a conversation, of which the prompt is the last."""


class Continuation:
    """Prompts continued side by side, each as it would be alone."""

    def __init__(
        self,
        trained: Trained,
        prompts: Sequence[str | Sequence[Message]],
        settings: Settings,
        *,
        recorded: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            trained: its model goes to the GPU if there is one.
            prompts: texts, or conversations in which the assistant speaks next; either all or none.
            recorded: keep of each token how likely it was.

        Raises:
            ConfigError: the model was not trained to continue a text, or conversations, or does not write in this way;
                a stop string is empty, or one is no UTF-8.
        """
        trained.check_continues()
        chat = trained.chat() if any(not isinstance(prompt, str) for prompt in prompts) else None
        self.apart = trained.writes_targets or chat is not None
        self.settings = settings
        self._recorded = recorded
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = trained.tokenizer
        texts = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]
        texts = [check_text(text, "a prompt") for text in texts]
        if chat is None:
            encoded = [ids.tolist() if len(ids) else [tokenizer.eos_id] for ids in tokenizer.encode(texts)]
        else:
            encoded = [chat.prompt(prompt).tolist() for prompt in prompts if not isinstance(prompt, str)]
        said: list[tuple[Message, ...]] = [() if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
        self.texts = [
            Text(prompt, ids, GrowingText(tokenizer.decode, settings.stops, [] if self.apart else ids), messages=told)
            for prompt, ids, told in zip(texts, encoded, said, strict=True)
        ]
        self._generation = _begun(
            trained,
            settings,
            [torch.tensor(ids, device=device) for ids in encoded],
            [torch.Generator(device).manual_seed(settings.seed + number) for number in range(len(prompts))],
            trained.tokenizer.eos_id if chat is None else chat.end_id,
        )

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(number of the text, piece of it) as soon as a piece is certain; without the prompts."""
        going = dict.fromkeys(range(len(self.texts)), self.settings.tokens)
        while going:
            found, records = self._generation.step(), dict[int, list[Token]]()
            for drawn in self._generation.drawn if self._recorded else []:
                records |= recorded(drawn, self.settings.sampling)
            for number, left in going.items():
                tokens = found.get(number, [])[:left]
                yield from self._grown(number, tokens, records.get(number, []))
                going[number] = left - len(tokens)
                if not going[number]:
                    self._generation.end(number)
            going = {number: left for number, left in going.items() if not self._generation.has_ended(number)}
        for number, text in enumerate(self.texts):
            yield self._shown(number, text.growing.finish())

    def _grown(self, number: int, tokens: list[int], records: list[Token]) -> Iterator[tuple[int, str]]:
        """A text with the tokens of a step before its end; `records`: of all that were drawn, if they are recorded."""
        text = self.texts[number]
        for place, token in enumerate(tokens):
            text.num_tokens += 1
            text.drawn += records[place : place + 1]
            yield self._shown(number, text.growing.add(token))
            if text.growing.ended:
                text.finish = "stop"
                self._generation.end(number)
                return
        if self._generation.has_ended(number) and number not in self._cut and text.num_tokens < self.settings.tokens:
            text.finish = "end"

    @property
    def _cut(self) -> set[int]:
        return self._generation.cut if isinstance(self._generation, Writing) else set()

    @property
    def drafting(self) -> Drafting | None:
        """How a model that drafts writes."""
        return self._generation.drafting if isinstance(self._generation, Writing) else None

    @property
    def passes(self) -> list[Passes] | None:
        """That each text took so far; None of a model that takes one for each token."""
        return self._generation.passes if isinstance(self._generation, Writing) else None

    def _shown(self, number: int, piece: str) -> tuple[int, str]:
        self.texts[number].continuation += piece
        return number, piece


def _begun(
    trained: Trained, settings: Settings, prompts: list[Tensor], generators: list[torch.Generator], eos_id: int
) -> Generation | Writing:
    """Prompts on the device that the model goes to; `eos_id` ends a text."""
    model = trained.model.to(prompts[0].device if prompts else "cpu")
    if isinstance(model, TwoDecoders):
        return Writing(
            model,
            prompts,
            settings.sampling,
            eos_id=eos_id,
            drafting=settings.drafting,
            continues=not trained.writes_targets,
            generators=generators,
        )
    if settings.drafting is not None:
        raise ConfigError(
            f"decode={settings.drafting.decode} is for a model that drafts (architecture=draft_and_verify); "
            f"{model.config.architecture} draws one token after the other: leave it out"
        )
    return Generation(model, prompts, settings.sampling, eos_id=eos_id, generators=generators)


def recorded(drawn: Drawn, sampling: Sampling) -> dict[int, list[Token]]:
    """How likely each token of a step was, by the number of its text."""
    sampled = torch.zeros_like(drawn.tokens, dtype=torch.float32)
    drafts = torch.full_like(drawn.tokens, NO_DRAFT) if drawn.drafts is None else drawn.drafts
    if sampling.temperature:
        probabilities = sampling.probabilities(drawn.logits, drawn.present)
        sampled = probabilities.gather(-1, drawn.tokens[..., None])[..., 0].log()
    return {
        number: [
            token._replace(sampling_log_probability=own, draft=None if draft == NO_DRAFT else draft)
            for token, own, draft in zip(scored(tokens, logits), owns, its, strict=True)
        ]
        for number, tokens, logits, owns, its in zip(
            drawn.numbers, drawn.tokens, drawn.logits, sampled.tolist(), drafts.tolist(), strict=True
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
