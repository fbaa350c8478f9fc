"""Validations of text from several sources; started through the fixture `ranks`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.sampling import packing_plan
from data_pipeline.sampling.kinds import AnyWindows
from data_pipeline.storage.dataset import Dataset
from model.architectures import registry
from model.architectures.token_model import TokenModel
from pretrain.config.dataset_identity import complete
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import evaluate, held_out, held_out_bytes
from pretrain.evaluation.part import choose
from pretrain.export.use import open_trained
from tests.objectives import objective

BATCH = 4


def opened(args: list[str]) -> tuple[Config, Dataset, AnyWindows, TokenModel]:
    """What is validated, and a model that is no good, but surer of some tokens than of others."""
    config = load(args)
    dataset = Dataset.of(config.data)
    config = complete(config, dataset)
    torch.manual_seed(0)
    model = registry.build(config.model)
    with torch.no_grad():
        model.token_embed.weight.mul_(20)
    if config.data.packing == "best_fit":
        packing_plan.prepare(dataset, config.model.context)
    return config, dataset, held_out(dataset, config), model.eval()


def validate(
    ranks: Ranks, runs: list[list[str]], unweighted: bool = False, number: int | None = None, whole: bool = True
) -> list[dict[str, float]]:
    """Of each run's arguments; `number` windows, or the `whole` text beside them. `unweighted`: a wrong mean, in which
    all ranks count alike."""
    if unweighted:
        add = Ranks.sum
        Ranks.sum = lambda self, values: add(self, (values / values[1]).nan_to_num())  # type: ignore[method-assign]
    found = []
    for args in runs:
        config, dataset, windows, model = ranks.together(lambda args=args: opened(args))  # type: ignore[misc]
        module = Engine(model, config, ranks).module if config.engine.zero_stage == 3 else model
        batches = Batches.of(config, dataset, ranks.device)
        part = choose(windows, number, dataset)
        given = (held_out_bytes(dataset), BATCH, ranks, batches)
        found.append(evaluate(module, windows, *given, part=part, whole=whole))
    return found


def validate_text(ranks: Ranks, path: str, texts: list[str]) -> float:
    """Bits per byte, as validation has it, of texts of whole windows that each follow the end of a document."""
    trained = open_trained(Path(path))

    class Windows:
        def __init__(self, text: str) -> None:
            [ids] = trained.tokenizer.encode([text])
            self.context = trained.model.config.context
            self.width = self.context + 1
            self.sources = ["text"]
            self._stream = np.concatenate([[trained.tokenizer.eos_id], ids])

        def __len__(self) -> int:
            count, left = divmod(len(self._stream) - 1, self.context)
            assert not left
            return count

        def read(self, indices: np.ndarray) -> np.ndarray:
            return np.lib.stride_tricks.sliding_window_view(self._stream, self.context + 1)[indices * self.context]

    batches, bits = Batches(ranks.device, objective()), 0.0
    for text in texts:
        windows: Any = Windows(text)
        found = evaluate(trained.model, windows, {"text": len(text.encode())}, 3, ranks, batches)
        bits += found["loss/val_bits_per_byte"] * len(text.encode())
    return bits / sum(len(text.encode()) for text in texts)
