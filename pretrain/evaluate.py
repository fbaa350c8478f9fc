"""Validation over the whole held-out text: the same batches, whatever the number of ranks."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from data_pipeline.dataset import AnyWindows, Dataset
from data_pipeline.errors import DataError
from model.interface import IGNORE
from pretrain.batches import Batches
from pretrain.config import Config
from pretrain.distributed import Ranks


def held_out(dataset: Dataset, config: Config) -> AnyWindows:
    """The windows that are validated on. Raises DataError when the held-out text is too short."""
    if config.data.packing == "best_fit":
        return dataset.packed_windows("validation", config.model.context)
    if dataset.manifest.pairs:
        return dataset.pairs("validation", config.model.context)
    # Spans are cut out of whole windows.
    partial = config.data.objective != "span_corruption"
    return dataset.windows("validation", config.model.context, partial=partial)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: AnyWindows,
    text_bytes: int,
    batch: int,
    ranks: Ranks,
    batches: Batches | None = None,
    edge: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Predict what `batches` asks for of the held-out text, in non-overlapping windows: every token but the first.

    The gates are averaged over windows; in the last one what lies behind the end of the text counts, too.

    Args:
        text_bytes: UTF-8 bytes of that text, for bits per byte.
        batch: windows of a forward pass on each rank.
        batches: makes them; for causal models, unless given.
        edge: called before each batch, as often on every rank; may raise to break off.

    Returns:
        `loss/val` (nats a label), `loss/val_bits_per_byte` if every token is predicted, and the gates' means under
        evaluation rounding as `gate/val_…`.

    Raises:
        DataError: there is nothing to predict.
    """
    batches = batches or Batches(ranks.device)
    model.eval()
    # Every rank makes the same number of forward passes (ZeRO-3 gathers in each); what is missing counts for nothing.
    rounds = math.ceil(len(windows) / (batch * ranks.world_size))
    totals: dict[str, float] = {}
    count = 0
    for index in range(rounds):
        edge()
        first = (index * ranks.world_size + ranks.rank) * batch
        indices = np.arange(first, min(first + batch, len(windows)))
        inputs = batches.of_validation(windows, indices)
        metrics = model(inputs).metrics
        predicted = int((inputs.labels != IGNORE).sum())
        count += predicted
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * predicted
    names = sorted(totals)
    sums = ranks.sum(torch.tensor([totals[name] for name in names] + [count], dtype=torch.float64)).tolist()
    if not sums[-1]:
        raise DataError("the held-out text is too short: nothing in it is to be predicted; hold out more")
    means = {name: total / sums[-1] for name, total in zip(names, sums, strict=False)}
    nats = means["cross_entropy"]
    result = {"loss/val": nats}
    if batches.predicts_every_token:
        result["loss/val_bits_per_byte"] = nats * sums[-1] / math.log(2) / text_bytes
    gates = {f"gate/val_{name}": means[name] for name in ("density", "mask_mean") if name in means}
    return result | gates
