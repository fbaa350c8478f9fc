"""A trained model after the run: evaluation and generation on one device."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.errors import ConfigError
from model.generate import Generation
from model.sampling import Sampling
from pretrain.batches import Batches
from pretrain.distributed import join
from pretrain.evaluate import evaluate, held_out
from pretrain.portable import is_export, load_export
from pretrain.text import GrowingText
from pretrain.trained import Trained, find_checkpoint, read_model, tokenizer_of


def open_trained(path: Path, step: int | None = None) -> Trained:
    """The model of a run folder (its newest checkpoint, or that of `step`), of a checkpoint or of an export.

    Raises:
        RunError: none of them.
        CheckpointError: no such checkpoint, or it is damaged.
        ConfigError: `step` of what is not a run folder.
        DataError: the tokenizer is missing, or another one.
    """
    if is_export(path):
        if step is not None:
            raise ConfigError(f"{path} is an export, which has one step; leave step {step} out")
        return load_export(path)
    checkpoint, config = find_checkpoint(path, step)
    return Trained(read_model(checkpoint, config), tokenizer_of(checkpoint, config)[1], config.data.objective)


def evaluate_run(run: Path, step: int | None) -> dict[str, float]:
    """Validation metrics of a checkpoint over all held-out text."""
    if is_export(run):
        raise ConfigError(f"{run} is an export, and does not say where its held-out text lies; name the run folder")
    checkpoint, config = find_checkpoint(run, step)
    model = read_model(checkpoint, config)
    dataset = Dataset.of(config.data)
    windows = held_out(dataset, config)
    with join(config.engine.timeout_minutes) as ranks:
        text_bytes = dataset.manifest.splits["validation"].bytes
        batch = max(1, 8192 // config.model.context)
        batches = Batches.of(config, dataset, ranks.device)
        return evaluate(model.to(ranks.device), windows, text_bytes, batch, ranks, batches)


def generate_texts(
    path: Path,
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
        UserError: as `open_trained` and `GrowingText` do.
        ConfigError: the model was not trained to continue a text.
    """
    pieces = continue_texts(open_trained(path, step), prompts, sampling, tokens=tokens, stops=stops, seed=seed)
    yield from enumerate(prompts)
    yield from pieces


def continue_texts(
    trained: Trained, prompts: Sequence[str], sampling: Sampling, *, tokens: int, stops: Sequence[str], seed: int
) -> Iterator[tuple[int, str]]:
    """As `generate_texts`, but for the prompts. The model goes to a GPU if there is one."""
    trained.check_continues()
    model, tokenizer = trained.model, trained.tokenizer
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
    return _grow(generation, texts, tokens)


def _grow(generation: Generation, texts: Sequence[GrowingText], tokens: int) -> Iterator[tuple[int, str]]:
    for _ in range(tokens):
        found = generation.step()
        for number, token in found.items():
            yield number, texts[number].add(token)
            if texts[number].ended:
                generation.end(number)
        if not found:
            break
    yield from ((number, text.finish()) for number, text in enumerate(texts))
