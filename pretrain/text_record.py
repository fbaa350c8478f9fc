"""What is known of a generated text: each token with its probability, its gates, and what it attends to.

The fields are described in docs/generate.md.
"""

from dataclasses import asdict
from typing import Any

import torch

from data_pipeline.tokenizer import Tokenizer
from model.inspection import Look, inspect
from model.language_model import LanguageModel
from pretrain.continuation import Settings, Text, Token, scored
from pretrain.text import GrowingText

FORMAT = 1


def record(
    model: LanguageModel, tokenizer: Tokenizer, text: Text, number: int, settings: Settings, look: Look | None = None
) -> dict[str, Any]:
    """A finished text, after one more pass over its last `context` tokens; ready for strict JSON.

    Args:
        text: recorded.
        number: of the text among those of its command.
        look: as `inspect` takes it.
    """
    ids = text.prompt_ids + [token.id for token in text.drawn]
    start = max(0, len(ids) - model.config.context)
    device = model.token_embed.weight.device
    seen = inspect(model, torch.tensor(ids[start:], device=device), look)
    prompt = [Token(token) for token in text.prompt_ids]
    predicted = text.prompt_ids[start + 1 :]
    if predicted:
        logits = model.token_embed(seen.states[: len(predicted)])
        prompt[start + 1 :] = scored(torch.tensor(predicted, device=device), logits)
    nothing: list[float | None] = [None] * start
    return {
        "format": FORMAT,
        "number": number,
        "prompt": text.prompt,
        "text": text.continuation,
        "finish": text.finish,
        "sampling": asdict(settings.sampling)
        | {"tokens": settings.tokens, "stop": list(settings.stops), "seed": settings.seed + number},
        "context": model.config.context,
        "inspected_from": start,
        "tokens": [
            *_tokens(prompt, tokenizer, prompt=True),
            *_tokens(text.drawn, tokenizer, prompt=False),
        ],
        "density": {
            mask: nothing + [round(share, 6) for share in density.tolist()] for mask, density in seen.density.items()
        },
    }


def _tokens(tokens: list[Token], tokenizer: Tokenizer, *, prompt: bool) -> list[dict[str, Any]]:
    growing = GrowingText(tokenizer.decode)
    return [
        {
            "id": token.id,
            "piece": tokenizer.piece(token.id),
            "text": growing.add(token.id),
            "prompt": prompt,
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
