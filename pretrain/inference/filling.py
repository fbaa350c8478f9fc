"""Gaps that a prompt marks, filled by a model that reads in any order."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from data_pipeline.errors import ConfigError
from data_pipeline.tokenize.tokenizer import Tokenizer
from model.architectures.two_stream.model import TwoStreams
from model.generation.sampling import Sampling
from pretrain.inference.continuation import Token, scored
from pretrain.inference.infilling import fill
from pretrain.inference.text import check_text
from pretrain.inference.trained import Trained

_GAP = re.compile(r"<gap:(\d+)>")
"""So many tokens are missing here."""


class Filling(NamedTuple):
    """A prompt and what fills its gaps."""

    prompt: str
    text: str
    gaps: list[list[Token]]

    def told(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Ready for JSON."""
        gaps = [[{**token._asdict(), "piece": tokenizer.piece(token.id)} for token in gap] for gap in self.gaps]
        return {"prompt": self.prompt, "text": self.text, "gaps": gaps}


def filled(trained: Trained, prompts: Sequence[str], sampling: Sampling, seed: int) -> list[Filling]:
    """Of each prompt; number n draws from seed + n.

    Raises:
        ConfigError: the model reads from the left alone; a prompt has no gap, nothing else, or too much.
    """
    model = trained.model
    if not isinstance(model, TwoStreams):
        raise ConfigError(
            f"--fill: {model.config.architecture} was not trained to know what stands behind a gap; a model of "
            "model.architecture=two_stream was"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    texts = [_with_gaps(prompt, trained.tokenizer, model.config.context) for prompt in prompts]
    return [
        _filling(prompt, ids, trained, model, sampling, torch.Generator(device).manual_seed(seed + number))
        for number, (prompt, ids) in enumerate(zip(prompts, texts, strict=True))
    ]


def _with_gaps(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """Its tokens, -1 where one is missing."""
    pieces = _GAP.split(check_text(prompt, "a prompt"))
    lengths = [int(length) for length in pieces[1::2]]
    if not lengths or not all(lengths):
        raise ConfigError(f"--fill: {prompt[:40]!r} marks no gap; write <gap:5> where 5 tokens are missing")
    known = [part.tolist() for part in tokenizer.encode(pieces[::2])]
    ids = list(known[0])
    for length, part in zip(lengths, known[1:], strict=True):
        ids += [*[-1] * length, *part]
    if max(ids) < 0:
        raise ConfigError(f"--fill: {prompt[:40]!r} has gaps alone; give some text before or behind them")
    if len(ids) > context + 1:
        raise ConfigError(
            f"--fill: {prompt[:40]!r} has {len(ids)} tokens with its gaps, and a model of model.context={context} "
            f"reads and predicts {context + 1} at most"
        )
    return ids


def _filling(
    prompt: str, ids: list[int], trained: Trained, model: TwoStreams, sampling: Sampling, generator: torch.Generator
) -> Filling:
    text = torch.tensor(ids, device=generator.device)
    eos_id = trained.tokenizer.eos_id
    gaps, last = list[list[Token]](), -2
    for place, token, logits in fill(model, text, sampling, eos_id=eos_id, generator=generator):
        ids[place] = token
        if place != last + 1:
            gaps.append([])
        gaps[-1] += scored(torch.tensor([token], device=text.device), logits[None])
        last = place
    return Filling(prompt, trained.tokenizer.decode(ids), gaps)
