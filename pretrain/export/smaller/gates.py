"""A smaller model: without what its gates and masks close for every token of the held-out text (docs/gates.md).

Blocks of gated feed forwards, exact on that text but for rounding: a gate reads the feed forward's input and not what
blocks give, so without a block that is closed anyway all other gates stay as they are.

Channels that feed forwards write and a mask then makes 0. Exact on that text, too, where the mask of a channel reads
that channel alone, or nothing of the feed forward: L0 gates, and learned dropout of source `elementwise` or `embed`.
Where each mask reads all channels of what is masked the others change, and the loss tells by how much.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, ConfigError
from model.architectures.token_model import TokenModel
from model.config.transformer import TransformerConfig
from model.layers.layers import FeedForward
from model.masks.block_gates import BlockFeedForward
from model.masks.site import SiteDropout
from pretrain.export.smaller.comparison import Shrunk, check_new, comparing, export_smaller
from pretrain.inference.trained import find_checkpoint, read_model


class Used(NamedTuple):
    """By site and layer, what any token has used so far."""

    blocks: dict[str, Tensor]
    """[G] bool."""
    channels: dict[str, Tensor]
    """[C] bool."""

    def kept(self, shape: TransformerConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Numbers of the blocks and of the channels that stay."""
        blocks = {name: _kept_blocks(shape, of) for name, of in self.blocks.items()}
        return blocks, {name: _kept_channels(of) for name, of in self.channels.items()}


def remove_closed(path: Path, step: int | None, folder: Path) -> Shrunk:
    """Take blocks and channels that no token uses out of a checkpoint's model; export what is left to a new folder.

    Raises:
        ConfigError: the model has neither block gates nor masks on feed forwards.
        CheckpointError: all are used; the folder is there already.
        RunError, DataError: as `find_checkpoint` and `evaluate_run`.
    """
    checkpoint, config = find_checkpoint(path, step)
    shape = config.model
    if not isinstance(shape, TransformerConfig) or not (shape.gate_sites or _masked(shape)):
        raise ConfigError(
            f"{path} was trained without model.block_gates, and without masks on what feed forwards write: there is "
            "nothing that gates could have closed"
        )
    check_new(folder)
    model = read_model(checkpoint, config)
    with comparing(checkpoint, config) as text:
        with watched(model) as used:
            before = text.loss(model)
        blocks, channels = used.kept(shape)
        changes = [f"{name}: {len(left)} of {len(used.blocks[name])} blocks stay" for name, left in blocks.items()]
        changes += [f"{name}: {len(left)} of {shape.width} channels stay" for name, left in channels.items()]
        everything = {**used.blocks, **used.channels}
        if all(len(left) == len(everything[name]) for name, left in {**blocks, **channels}.items()):
            raise CheckpointError(
                f"{checkpoint.path}: every block and every channel is used by some token of the held-out text"
            )
        if channels and shape.dropout_sites and shape.learned_dropout.source in ("attention", "low_rank"):
            changes.append("masks read all that feed forwards write, so those of other channels change: see the loss")
        left, weights = without_closed(model.cpu(), blocks, channels)
        smaller = config.model_copy(update={"model": left})
        measured = export_smaller(checkpoint, smaller, weights, folder, (model, before), text)
    return Shrunk(changes, *measured)


def _masked(shape: TransformerConfig) -> bool:
    return any(site.endswith("_ff") for site in (*shape.dropout_sites, *shape.l0_sites))


@contextmanager
def watched(model: TokenModel) -> Iterator[Used]:
    """Which blocks tokens open, and which channels pass a mask."""
    used, hooks = Used({}, {}), []

    def look(used: Tensor, module: BlockFeedForward, inputs: tuple[Any, ...], output: object) -> None:
        used |= module.gates(inputs[0]).opened.flatten(0, 1).any(0).to(used.device)

    def see(used: Tensor, module: SiteDropout, inputs: tuple[Any, ...], output: tuple[Tensor, object]) -> None:
        used |= (output[0] != 0).flatten(0, 1).any(0).to(used.device)

    for _, layer in _layers(model):
        name, ff = layer.ff_dropout.name, layer.ff
        if isinstance(ff, BlockFeedForward):
            used.blocks[name] = torch.zeros(ff.blocks, dtype=torch.bool)
            hooks.append(ff.register_forward_hook(partial(look, used.blocks[name])))
        elif type(ff) is FeedForward and type(layer.ff_dropout) is not SiteDropout:
            used.channels[name] = torch.zeros(model.config.width, dtype=torch.bool)
            hooks.append(layer.ff_dropout.register_forward_hook(partial(see, used.channels[name])))
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: TokenModel) -> Iterator[tuple[str, Any]]:
    """The layers of all streams, by name."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "ff", None), nn.Module) and isinstance(
            getattr(module, "ff_dropout", None), SiteDropout
        ):
            yield path, module


def _kept_blocks(config: TransformerConfig, used: Tensor) -> Tensor:
    """Numbers of the blocks that stay; the first ones where none would, or fewer than a token opens."""
    least = config.block_gates.num_open if config.block_gates.kind == "top" else 1
    order = used.int().argsort(descending=True, stable=True)
    return order[: max(least, int(used.sum()))].sort().values


def _kept_channels(used: Tensor) -> Tensor:
    """Numbers of the channels that stay, one at least."""
    return used.nonzero()[:, 0] if used.any() else torch.zeros(1, dtype=torch.int64)


def without_closed(
    model: TokenModel, blocks: Mapping[str, Tensor], channels: Mapping[str, Tensor]
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the model with what is kept, by site and layer."""
    shape, weights = model.config, dict(model.state_dict())
    assert isinstance(shape, TransformerConfig)
    left = {name: len(kept) for name, kept in channels.items() if len(kept) < shape.width}
    for path, layer in _layers(model):
        name, place = layer.ff_dropout.name, f"{path}.ff"
        if name in blocks:
            for part in ("up", "up_bias", "down", "gate", "gate_bias"):
                if (whole := weights.get(f"{place}.{part}")) is not None:
                    taken = whole.unflatten(0, (layer.ff.blocks, -1))[blocks[name]]
                    weights[f"{place}.{part}"] = taken.flatten(0, 1).contiguous()
        elif name in left:
            for part in ("weight", "bias"):
                if (whole := weights.get(f"{place}.down.{part}")) is not None:
                    weights[f"{place}.down.{part}"] = whole[channels[name]]
            weights[f"{place}.channels"] = channels[name]
    gates = shape.block_gates
    fewer = {name: len(kept) for name, kept in blocks.items() if len(kept) < gates.blocks}
    changed = {"block_gates": gates.model_dump() | {"left": fewer}, "channels_left": shape.channels_left | left}
    return type(shape).model_validate(shape.model_dump() | changed), weights
