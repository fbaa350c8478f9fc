"""A smaller model: without the gated blocks that no token of the held-out text opens (docs/gates.md).

Exact on that text but for rounding, since a gate reads the feed forward's input and not what blocks give: without a
block that is closed anyway all other gates stay as they are. Of other texts it need not be.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import CheckpointError, ConfigError
from model.architectures import registry
from model.architectures.token_model import TokenModel
from model.config.transformer import TransformerConfig
from model.masks.block_gates import BlockFeedForward, block_gates
from pretrain.config.schema import Config
from pretrain.export.portable import write_export
from pretrain.export.use import validating
from pretrain.inference.trained import find_checkpoint, read_model
from pretrain.metric_names import VALIDATION


class Shrunk(NamedTuple):
    """What became of a model."""

    blocks: dict[str, tuple[int, int]]
    """By site and layer: before and after."""
    parameters: tuple[int, int]
    loss: tuple[float, float]
    """Validation, in nats a label."""


def shrink(path: Path, step: int | None, folder: Path) -> Shrunk:
    """Take unused blocks out of a checkpoint's model, and export what is left into a new folder.

    Raises:
        ConfigError: the model has no block gates.
        CheckpointError: every block is used; the folder is there already.
        RunError, DataError: as `find_checkpoint` and `evaluate_run`.
    """
    checkpoint, config = find_checkpoint(path, step)
    if not isinstance(config.model, TransformerConfig) or not config.model.gate_sites:
        raise ConfigError(f"{path} was trained without model.block_gates: there are no blocks to remove")
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already; name a new folder")
    model = read_model(checkpoint, config)
    with validating(checkpoint, config) as validate:
        with _watched(model) as used:
            before = validate(model)[VALIDATION]
        kept = _kept(config.model, used)
        if not any(len(blocks) < len(used[name]) for name, blocks in kept.items()):
            raise CheckpointError(f"{checkpoint.path}: every block is opened by some token of the held-out text")
        smaller, weights = _without(config, model.cpu(), kept)
        other = registry.build(smaller.model)
        other.load_state_dict(weights)
        after = validate(other.eval())[VALIDATION]
    parameters = model.num_parameters(), other.num_parameters()
    write_export(checkpoint, smaller, folder, weights={name: weights[name] for name, _ in other.named_parameters()})
    counts = {name: (len(used[name]), len(blocks)) for name, blocks in kept.items()}
    return Shrunk(counts, parameters, (before, after))


@contextmanager
def _watched(model: TokenModel) -> Iterator[dict[str, Tensor]]:
    """By site and layer: which blocks any token has opened so far, [G] bool."""
    gates = block_gates(model)
    used = {ff.name: torch.zeros(ff.blocks, dtype=torch.bool) for ff in gates}

    def look(used: Tensor, module: BlockFeedForward, inputs: tuple[Any, ...], output: object) -> None:
        used |= module.gates(inputs[0]).opened.flatten(0, 1).any(0).to(used.device)

    hooks = [ff.register_forward_hook(partial(look, used[ff.name])) for ff in gates]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def _kept(config: TransformerConfig, used: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of the blocks that stay; the first ones where none would, or fewer than a token opens."""
    least = config.block_gates.num_open if config.block_gates.kind == "top" else 1
    found = {}
    for name, blocks in used.items():
        order = blocks.int().argsort(descending=True, stable=True)
        found[name] = order[: max(least, int(blocks.sum()))].sort().values
    return found


def _without(config: Config, model: TokenModel, kept: Mapping[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the tensors of the model with the blocks that are kept."""
    shape, weights = config.model, model.state_dict()
    assert isinstance(shape, TransformerConfig)
    for path, module in model.named_modules():
        if not isinstance(module, BlockFeedForward):
            continue
        for name in ("up", "up_bias", "down", "gate", "gate_bias"):
            if (whole := weights.get(f"{path}.{name}")) is not None:
                blocks = whole.unflatten(0, (module.blocks, -1))[kept[module.name]]
                weights[f"{path}.{name}"] = blocks.flatten(0, 1).contiguous()
    left = {name: len(blocks) for name, blocks in kept.items() if len(blocks) < shape.block_gates.blocks}
    changed = shape.model_dump() | {"block_gates": shape.block_gates.model_dump() | {"left": left}}
    return config.model_copy(update={"model": type(shape).model_validate(changed)}), weights
