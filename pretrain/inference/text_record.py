"""The record of a generated text: each token with its probability, its gates, and what it attends to.

The fields are described in docs/generate.md.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from data_pipeline.tokenize.tokenizer import Tokenizer
from model.generation.inspection import Look, inspect
from pretrain.inference.continuation import Settings, Text, Token, scored
from pretrain.inference.text import GrowingText
from pretrain.inference.trained import Trained

FORMAT = 1
_CHUNK = 128
"""Tokens of a prompt whose logits are formed at a time."""


@torch.no_grad()
def record(trained: Trained, text: Text, number: int, settings: Settings, look: Look | None = None) -> dict[str, Any]:
    """A finished text, after one more pass over its last `context` tokens; ready for strict JSON.

    Args:
        text: recorded.
        number: of the text among those of its command.
        look: as `inspect` takes it.
    """
    model, tokenizer = trained.model, trained.tokenizer
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
    return {
        "format": FORMAT,
        "number": number,
        "model": {"run": trained.run, "step": trained.step, "architecture": model.config.architecture}
        | {"context": model.config.context},
        "prompt": text.prompt,
        "text": text.continuation,
        "finish": text.finish,
        "sampling": asdict(settings.sampling)
        | {"tokens": settings.tokens, "stop": list(settings.stops), "seed": settings.seed + number},
        "inspected_from": start,
        "tokens": [
            *_tokens(prompt, tokenizer),
            *_tokens(text.drawn, tokenizer, text.prompt_ids),
        ],
        "density": {
            mask: nothing + [round(share, 6) for share in density.tolist()] for mask, density in seen.density.items()
        },
        "steps": [] if seen.steps is None else nothing + [int(steps) for steps in seen.steps.tolist()],
    }


def _tokens(tokens: list[Token], tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Of the prompt's tokens, or of those behind it."""
    growing = GrowingText(tokenizer.decode, before=prompt)
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
        for token in tokens
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
