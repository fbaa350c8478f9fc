"""Text from a model, one token after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.config import ModelConfig
from model.language_model import LanguageModel


def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue a prompt. Each token is computed from the last `context` tokens anew.

    Args:
        prompt_ids: [T0] int64, T0 >= 1, on the model's device.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        eos_id: ends the text; it is not given out.
        generator: source of the draws, on the model's device.

    Raises:
        ConfigError: the model is not causal, so it does not continue a text.
        ValueError: the prompt is empty.
    """
    check_continues(model.config)
    if not len(prompt_ids):
        raise ValueError("a prompt needs at least one token")
    ids = prompt_ids
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model.logits(ids[None, -model.config.context :])[0, -1].float()
            token = _draw(logits, temperature, top_k, generator)
        if (value := int(token)) == eos_id:
            return
        yield value
        ids = torch.cat([ids, token])


def check_continues(config: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot continue a prompt."""
    if config.architecture == "encoder_only":
        raise ConfigError("encoder_only fills masked places from both sides: it has no next token to draw")
    if config.architecture == "encoder_decoder":
        raise ConfigError(
            "encoder_decoder was trained to write the spans that are missing in a text, not to continue a prompt"
        )


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Logits [V] -> token [1]."""
    if temperature == 0.0:
        return logits.argmax(keepdim=True)
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
