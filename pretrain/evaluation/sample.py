"""A short text from the model under training, the same on every rank."""

import torch

from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from model.architectures.token_model import TokenModel
from model.generation.generate import generate
from model.generation.sampling import Sampling
from pretrain.config.schema import Config

PROMPT_TOKENS = 16
SAMPLING = Sampling(temperature=0.8, top_k=50)


@torch.no_grad()
def sample_text(model: TokenModel, dataset: Dataset, config: Config, device: torch.device) -> str:
    """Continue the first words of the held-out text by `train.sample_tokens` tokens."""
    model.eval()
    tokenizer = dataset.tokenizer()
    first = Windows.of(dataset, "validation", config.model.context, partial=True).read(
        torch.zeros(1, dtype=torch.int64).numpy()
    )[0]
    first = dataset.manifest.plain(first[first >= 0])  # a very short text ends within the window
    prompt = torch.from_numpy(first[: min(PROMPT_TOKENS, config.model.context // 2)]).to(device)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    tokens = generate(
        model,
        prompt,
        SAMPLING,
        max_new_tokens=config.train.sample_tokens,
        eos_id=tokenizer.eos_id,
        generator=generator,
    )
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled anew for every length
        return tokenizer.decode(prompt.tolist()) + " ⟶ " + tokenizer.decode(list(tokens))
