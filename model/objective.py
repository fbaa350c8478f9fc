"""The number that training lowers, and what is told about it."""

import torch
from torch import Tensor

from model.config import LearnedDropoutConfig
from model.interface import Batch, ModelOutput
from model.learned_dropout import MaskStatistics, Statistics
from model.losses import cross_entropy, weight_at


def objective(
    logits: Tensor, batch: Batch, statistics: Statistics, config: LearnedDropoutConfig, training: bool
) -> ModelOutput:
    """Cross entropy of the logits [B, T, V]; in training plus the penalties, averaged over the masks.

    Every mask counts alike. In evaluation the penalties are told but do not enter the loss.
    """
    loss = ce = cross_entropy(logits, batch.labels)
    metrics = {"cross_entropy": ce}
    if statistics:
        mean = MaskStatistics(*(torch.stack(values).mean() for values in zip(*statistics.values(), strict=True)))
        entropy_weight, l1_weight = weight_at(batch.step, config.entropy), weight_at(batch.step, config.l1)
        if training:
            loss = ce + entropy_weight * mean.entropy + l1_weight * mean.l1
        metrics |= mean._asdict() | {"entropy_weight": entropy_weight, "l1_weight": l1_weight}
        metrics |= {f"density/{name}": mask.density for name, mask in statistics.items()}
        metrics |= {f"entropy/{name}": mask.entropy for name, mask in statistics.items()}
    metrics["loss"] = loss
    return ModelOutput(loss, {name: value.detach() for name, value in metrics.items()})
