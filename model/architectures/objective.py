"""The number that training lowers, and what is told about it."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, ModelOutput
from model.config.mask_config import PenaltyConfig
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.layers.chunked_loss import TokenLoss
from model.masks.penalties import weight_at
from model.masks.site import Statistics

BLOCK_PENALTY = "block_penalty"


class Auxiliary(NamedTuple):
    """What an architecture adds to the loss of the tokens, in training."""

    loss: Tensor | None = None
    """0-d, with its weight."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """What is told about it."""


def objective(
    tokens: TokenLoss,
    batch: Batch,
    statistics: Statistics,
    auxiliary: Auxiliary,
    config: ModelConfig,
    training: bool,
) -> ModelOutput:
    """The loss of the tokens; in training plus the penalties, averaged over the masks.

    Every mask counts alike. In evaluation the penalties are told but do not enter the loss.
    """
    loss = tokens.loss
    metrics = {"cross_entropy": tokens.cross_entropy}
    if config.z_loss:
        metrics["z_loss"] = tokens.z_loss
    if statistics:
        masks = list(statistics.values())
        found = {name: [mask[name] for mask in masks if name in mask] for mask in masks for name in mask}
        of_masks = {name: torch.stack(values) for name, values in found.items() if not values[0].ndim}
        mean = {name: values.mean() for name, values in of_masks.items()}
        if training and BLOCK_PENALTY in of_masks:  # each feed forward's is a constraint of its own
            loss = loss + of_masks[BLOCK_PENALTY].sum()
        for name, penalty in _penalties(config).items():
            if name not in mean:
                continue
            weight = metrics[f"{name}_weight"] = weight_at(batch.step, penalty)
            if training:
                loss = loss + weight * mean[name]
        metrics |= mean
        metrics |= {f"{name}/{mask}": of[name] for name in found for mask, of in statistics.items() if name in of}
    if auxiliary.loss is not None:
        loss = loss + auxiliary.loss
        metrics |= auxiliary.metrics
    metrics["loss"] = loss
    return ModelOutput(loss, {name: value.detach() for name, value in metrics.items()}, tokens.by_token)


def _penalties(config: ModelConfig) -> dict[str, PenaltyConfig]:
    """By the statistic that they penalise."""
    if not isinstance(config, TransformerConfig):
        return {}
    of_gates: dict[str, PenaltyConfig] = {"block_entropy": config.block_gates.entropy}
    if config.l0.enabled:
        return {"l0": config.l0} | of_gates
    return {"entropy": config.learned_dropout.entropy, "l1": config.learned_dropout.l1} | of_gates
