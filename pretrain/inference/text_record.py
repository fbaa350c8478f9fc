"""The record of a generated text: each token with its probability, its gates, and what it attends to.

The fields are described in docs/generate.md.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenize.tokenizer import Tokenizer
from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig
from model.architectures.token_model import TokenModel
from model.generation.drafting import Drafting
from model.generation.inspection import Look, inspect, inspect_target
from model.generation.target import Passes
from pretrain.inference.continuation import Settings, Text, Token, scored
from pretrain.inference.text import GrowingText
from pretrain.inference.trained import Trained

FORMAT = 1
_CHUNK = 128
"""Tokens of a prompt whose logits are formed at a time."""


@torch.no_grad()
def record(
    trained: Trained,
    text: Text,
    number: int,
    settings: Settings,
    look: Look | None = None,
    drafted: tuple[Drafting, Passes] | None = None,
) -> dict[str, Any]:
    """A finished text, after one more pass over its last `context` tokens; ready for strict JSON.

    Args:
        text: recorded.
        number: of the text among those of its command.
        look: as `inspect` takes it; of a model that reads one sequence and writes another it gets nothing.
        drafted: how a model that drafts wrote it.
    """
    model, tokenizer = trained.model, trained.tokenizer
    steps: list[float | None] = []
    if model.config.traits.two_sequences:
        prompt, start, density = [Token(token) for token in text.prompt_ids], *_target_density(trained, text)
    else:
        prompt, start, density, steps = _read_again(model, text, look)
    return {
        "format": FORMAT,
        "number": number,
        "model": {"run": trained.run, "step": trained.step, "architecture": model.config.architecture}
        | {"context": model.config.context},
        "prompt": text.prompt,
        **({"messages": [message._asdict() for message in text.messages]} if text.messages else {}),
        "text": text.continuation,
        "finish": text.finish,
        "sampling": asdict(settings.sampling)
        | {"tokens": settings.tokens, "stop": list(settings.stops), "seed": settings.seed + number},
        "inspected_from": start,
        "tokens": [
            *_tokens(prompt, tokenizer),
            *_tokens(text.drawn, tokenizer, text.prompt_ids, apart=trained.writes_targets),
        ],
        "density": density,
        "steps": steps,
    } | ({} if drafted is None else {"drafting": asdict(drafted[0]), "passes": asdict(drafted[1])})


Densities = dict[str, list[float | None]]


def _read_again(
    model: TokenModel, text: Text, look: Look | None
) -> tuple[list[Token], int, Densities, list[float | None]]:
    """The prompt with how likely its tokens were, the first token that is seen, and gates and steps from there on."""
    ids = text.prompt_ids + [token.id for token in text.drawn]
    start = max(0, len(ids) - model.config.context)
    device = model.token_embed.weight.device
    prefix = max(0, len(text.prompt_ids) - start) if model.config.reads_prompt else None
    seen = inspect(model, torch.tensor(ids[start:], device=device), look, prefix)
    prompt = [Token(token) for token in text.prompt_ids]
    predicted = torch.tensor(text.prompt_ids[start + 1 :], dtype=torch.int64, device=device)
    chunks = zip(predicted.split(_CHUNK), seen.states[: len(predicted)].split(_CHUNK), strict=True)
    prompt[start + 1 :] = [token for part, states in chunks for token in scored(part, model.token_embed(states))]
    nothing: list[float | None] = [None] * start
    densities = {mask: nothing + _rounded_all(density) for mask, density in seen.density.items()}
    return (
        prompt,
        start,
        densities,
        [] if seen.steps is None else nothing + [int(steps) for steps in seen.steps.tolist()],
    )


def _target_density(trained: Trained, text: Text) -> tuple[int, Densities]:
    """The same of a model that reads one sequence and writes another: the target, or the last chunk of a text.

    The encoder's gates are those of the tokens that it reads, the decoder's those with which it reads a token to
    predict the next one: at the first place it reads end-of-text, which counts as the token before.
    """
    eos, context, length = trained.tokenizer.eos_id, trained.model.config.context, len(text.prompt_ids)
    ids = text.prompt_ids + [token.id for token in text.drawn]
    if trained.writes_targets:
        behind, first = ids[length:], 0
        read = text.prompt_ids if text.prompt_ids[-1] == eos else [*text.prompt_ids, eos]
        read = read[:context]
    else:
        assert isinstance(trained.model.config, DraftAndVerifyConfig)
        chunk = (len(ids) - length - 1) // trained.model.config.chunk if len(ids) > length else 0
        length += chunk * trained.model.config.chunk
        first = max(0, length - context)
        read, behind = ids[first:length], ids[length:]
    if not behind:
        return first, {}
    device = trained.model.token_embed.weight.device
    source, written = (torch.tensor(some, device=device) for some in (read, [eos, *behind[:-1]]))
    found: Densities = {}
    for mask, density in inspect_target(trained.model, source, written).items():
        of_source = mask.startswith("enc_") or mask == "embed/00"
        start = first if of_source else length - 1
        kept = density[: length - first] if of_source else density  # of the source's own end nothing is told
        values = [*[None] * start, *_rounded_all(kept)]
        found[mask] = values + [None] * (len(ids) - len(values))
    return first, found


def _rounded_all(density: Tensor) -> list[float | None]:
    return [round(share, 6) for share in density.tolist()]


def _tokens(
    tokens: list[Token], tokenizer: Tokenizer, prompt: Sequence[int] = (), *, apart: bool = False
) -> list[dict[str, Any]]:
    """Of the prompt's tokens, or of those behind it; `apart`: which begin a text of their own."""
    growing = GrowingText(tokenizer.decode, before=() if apart else prompt)
    return [
        {
            "id": token.id,
            "piece": tokenizer.piece(token.id),
            "text": growing.add(token.id),
            "prompt": not prompt,
            "log_probability": _rounded(token.log_probability),
            "sampling_log_probability": _rounded(token.sampling_log_probability),
            "rank": token.rank,
            "likeliest": [
                {"id": other, "piece": tokenizer.piece(other), "log_probability": _rounded(log_probability)}
                for other, log_probability in token.likeliest
            ],
        }
        | ({} if token.draft is None else {"draft": {"id": token.draft, "piece": tokenizer.piece(token.draft)}})
        for token in tokens
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
