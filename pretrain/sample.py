"""A short text from the model under training, the same on every rank."""

import torch

from data_pipeline.dataset import Dataset
from model.generate import generate
from model.language_model import LanguageModel
from pretrain.config import Config

PROMPT_TOKENS = 16
TEMPERATURE = 0.8
TOP_K = 50


@torch.no_grad()
def sample_text(model: LanguageModel, dataset: Dataset, config: Config, device: torch.device) -> str:
    """Continue the first words of the held-out text by `train.sample_tokens` tokens."""
    model.eval()
    tokenizer = dataset.tokenizer()
    first = dataset.windows("validation", config.model.context, partial=True).read(
        torch.zeros(1, dtype=torch.int64).numpy()
    )[0]
    first = first[first >= 0]  # a very short text ends within the window
    prompt = torch.from_numpy(first[: min(PROMPT_TOKENS, config.model.context // 2)]).to(device)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    tokens = generate(
        model,
        prompt,
        max_new_tokens=config.train.sample_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        eos_id=tokenizer.eos_id,
        generator=generator,
    )
    return tokenizer.decode(prompt.tolist()) + " ⟶ " + tokenizer.decode(list(tokens))
