"""A trained model, read from a checkpoint onto one device: evaluation and generation after the run."""

from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.errors import CheckpointError, ConfigError
from data_pipeline.tokenizer import Tokenizer
from model import registry
from model.generate import check_continues, generate
from model.language_model import LanguageModel
from pretrain.batches import Batches
from pretrain.checkpoint import Checkpoint, complete, step_path
from pretrain.config import Config
from pretrain.distributed import join
from pretrain.evaluate import evaluate
from pretrain.run import RunFolder


def load_model(run: Path, step: int | None) -> tuple[LanguageModel, Config, Checkpoint]:
    """The model of a run's newest checkpoint, or of that of `step`, in fp32 and evaluation mode.

    Raises:
        RunError: not a run folder.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    folder = RunFolder(run)
    config = folder.config()
    found = complete(folder.checkpoints)
    if not found:
        raise CheckpointError(f"{run}: no complete checkpoint yet")
    path = found[0] if step is None else step_path(folder.checkpoints, step)
    if path not in found:
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in found)
        raise CheckpointError(f"{run}: no complete checkpoint of step {step}; there are: {steps}")
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    model = registry.build(config.model)
    model.load_state_dict(checkpoint.weights())
    return model.eval(), config, checkpoint


def evaluate_run(run: Path, step: int | None) -> dict[str, float]:
    """Validation metrics of a checkpoint over all held-out text."""
    model, config, _ = load_model(run, step)
    dataset = Dataset.open(config.data.path)
    windows = dataset.windows("validation", config.model.context, partial=True)
    with join(config.engine.timeout_minutes) as ranks:
        text_bytes = dataset.manifest.splits["validation"].bytes
        batch = max(1, 8192 // config.model.context)
        batches = Batches.of(config, dataset, ranks.device)
        return evaluate(model.to(ranks.device), windows, text_bytes, batch, ranks, batches)


def generate_text(
    run: Path, step: int | None, prompt: str, *, tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Continue a prompt; the prompt first, then each piece of text as soon as it is whole characters.

    Raises:
        ConfigError: the model was not trained to continue a text.
    """
    model, config, _ = load_model(run, step)
    check_continues(config.model)
    if config.data.objective != "causal":
        raise ConfigError(
            f"{run}: trained with data.objective={config.data.objective}, where a prompt is read both ways; it is not "
            "generated from"
        )
    tokenizer: Tokenizer = Dataset.open(config.data.path).tokenizer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer.encode([prompt])[0].tolist() if prompt else []
    shown = ""
    produced: list[int] = []
    yield prompt
    for token in generate(
        model.to(device),
        torch.tensor(ids or [tokenizer.eos_id], device=device),
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        eos_id=tokenizer.eos_id,
        generator=torch.Generator(device).manual_seed(seed),
    ):
        produced.append(token)
        text = tokenizer.decode(produced)
        if text.endswith("\ufffd"):  # a character of several byte pieces, not whole yet
            continue
        yield text[len(shown) :]
        shown = text
