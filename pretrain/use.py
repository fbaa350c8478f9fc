"""A trained model, read from a checkpoint onto one device: evaluation and generation after the run."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.errors import CheckpointError, ConfigError
from data_pipeline.tokenizer import Tokenizer
from model import registry
from model.generate import Generation, check_continues
from model.language_model import LanguageModel
from model.sampling import Sampling
from pretrain.batches import Batches
from pretrain.buffers import persistent_buffers
from pretrain.checkpoint import Checkpoint, complete, step_path
from pretrain.config import Config
from pretrain.distributed import join
from pretrain.evaluate import evaluate, held_out, held_out_bytes
from pretrain.run import RunFolder
from pretrain.text import GrowingText


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
    checkpoint.check_buffers(persistent_buffers(model))
    model.load_state_dict(checkpoint.weights() | checkpoint.buffers())
    return model.eval(), config, checkpoint


def evaluate_run(run: Path, step: int | None) -> dict[str, float]:
    """Validation metrics of a checkpoint over all held-out text, as `evaluate` gives them."""
    model, config, _ = load_model(run, step)
    dataset = Dataset.of(config.data)
    windows = held_out(dataset, config)
    with join(config.engine.timeout_minutes) as ranks:
        batch = max(1, 8192 // config.model.context)
        batches = Batches.of(config, dataset, ranks.device)
        return evaluate(model.to(ranks.device), windows, held_out_bytes(dataset), batch, ranks, batches)


def generate_texts(
    run: Path,
    step: int | None,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    tokens: int,
    stops: Sequence[str],
    seed: int,
) -> Iterator[tuple[int, str]]:
    """Continue prompts side by side, each as it would alone, by at most `tokens` tokens.

    Text number n draws from seed + n, and ends before the first of `stops` that it holds.

    Returns:
        (number of the text, piece of it) as soon as a piece is certain; the prompts first.

    Raises:
        UserError: as `load_model` and `GrowingText` do.
        ConfigError: the model was not trained to continue a text.
    """
    model, config, _ = load_model(run, step)
    check_continues(config.model)
    if config.data.objective != "causal":
        raise ConfigError(
            f"{run}: trained with data.objective={config.data.objective}, where a prompt is read both ways; it is not "
            "generated from"
        )
    tokenizer: Tokenizer = Dataset.of(config.data).tokenizer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [GrowingText(tokenizer.decode, stops) for _ in prompts]
    encoded = [ids.tolist() if len(ids) else [tokenizer.eos_id] for ids in tokenizer.encode(list(prompts))]
    generation = Generation(
        model.to(device),
        [torch.tensor(ids, device=device) for ids in encoded],
        sampling,
        eos_id=tokenizer.eos_id,
        generators=[torch.Generator(device).manual_seed(seed + number) for number in range(len(prompts))],
    )
    yield from enumerate(prompts)
    for _ in range(tokens):
        found = generation.step()
        for number, token in found.items():
            yield number, texts[number].add(token)
            if texts[number].ended:
                generation.end(number)
        if not found:
            break
    yield from ((number, text.finish()) for number, text in enumerate(texts))
