"""Validation over the whole held-out text: the same batches, whatever the number of ranks."""

import math

import numpy as np
import torch
from torch import nn

from data_pipeline.dataset import Windows
from model.interface import IGNORE, Batch
from pretrain.distributed import Ranks


def to_batch(tokens: torch.Tensor, samples: torch.Tensor, step: int, seed: int, device: torch.device) -> Batch:
    """Windows [B, T+1] of tokens, -1 where there is none, as a model's batch."""
    tokens = tokens.to(device, non_blocking=True)
    inputs, labels = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    labels = torch.where(labels < 0, IGNORE, labels)
    return Batch(inputs, labels, samples.to(device, non_blocking=True), torch.full((), step, device=device), seed)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, text_bytes: int, batch: int, ranks: Ranks) -> dict[str, float]:
    """Predict every token of the held-out text but its first, in non-overlapping windows.

    The gates are averaged over windows; in the last one what lies behind the end of the text counts, too.

    Args:
        text_bytes: UTF-8 bytes of that text, for bits per byte.
        batch: windows of a forward pass on each rank.

    Returns:
        `loss/val` (nats a token), `loss/val_bits_per_byte`, and the gates' means under evaluation rounding as
        `gate/val_…`.
    """
    model.eval()
    # Every rank makes the same number of forward passes (ZeRO-3 gathers in each); what is missing counts for nothing.
    rounds = math.ceil(len(windows) / (batch * ranks.world_size))
    nothing = torch.full((1, windows.context + 1), -1, dtype=torch.int64)
    totals: dict[str, float] = {}
    count = 0
    for index in range(rounds):
        first = (index * ranks.world_size + ranks.rank) * batch
        indices = np.arange(first, min(first + batch, len(windows)))
        tokens = torch.from_numpy(windows.read(indices)) if len(indices) else nothing
        samples = torch.arange(first, first + len(tokens))
        inputs = to_batch(tokens, samples, step=0, seed=0, device=ranks.device)
        metrics = model(inputs).metrics
        predicted = int((inputs.labels != IGNORE).sum())
        count += predicted
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * predicted
    names = sorted(totals)
    sums = ranks.sum(torch.tensor([totals[name] for name in names] + [count], dtype=torch.float64)).tolist()
    means = {name: total / sums[-1] for name, total in zip(names, sums, strict=False)}
    nats = means["cross_entropy"]
    result = {"loss/val": nats, "loss/val_bits_per_byte": nats * sums[-1] / math.log(2) / text_bytes}
    gates = {f"gate/val_{name}": means[name] for name in ("density", "mask_mean") if name in means}
    return result | gates
