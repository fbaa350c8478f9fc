"""A smaller model: without those heads of attention and those hidden units of feed forwards that add the least.

What a part adds to the stream is measured on the held-out text: a map [C, n s] reads n parts of s channels, x_p, and

    importance_p = mean over tokens of |W_p x_p|²

which is 0 only of a part whose absence changes nothing there. Heads that share keys and values go together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from model.architectures.external import shown
from model.architectures.token_model import TokenModel
from model.attention.attention import CrossAttention, SelfAttention
from model.config.transformer import TransformerConfig
from model.layers.layers import FeedForward
from pretrain.export.smaller.comparison import Shrunk, check_new, comparing, export_smaller
from pretrain.inference.trained import find_checkpoint, read_model


class Removable(NamedTuple):
    """Of a module, what can be taken out of it."""

    module: SelfAttention | CrossAttention | FeedForward
    reads: nn.Linear
    """The map that writes what the parts give to the stream."""
    number: int

    @property
    def size(self) -> int:
        """Channels of a part."""
        return self.reads.in_features // self.number


def remove_units(path: Path, step: int | None, folder: Path, heads: str | None, units: str | None) -> Shrunk:
    """Take heads, hidden units or both out of a checkpoint's model, and export what is left into a new folder.

    Args:
        heads: how many of each attention, such as "1", or what share, such as "0.25".
        units: the same of each feed forward.

    Raises:
        ConfigError: no number or share, or the model cannot be without.
        CheckpointError: the folder is there already.
        RunError, DataError: as `find_checkpoint` and `evaluate_run`.
    """
    checkpoint, config = find_checkpoint(path, step)
    shape = config.model
    if not isinstance(shape, TransformerConfig):
        raise ConfigError(f"model.architecture={shape.architecture}: what its heads and units are, it alone knows")
    if heads and (why := shape.why_heads_stay):
        raise ConfigError(f"--heads: {why}; take --units")
    if units and shape.gate_sites:
        raise ConfigError("--units: model.block_gates cut the hidden units into blocks; --gates removes whole blocks")
    model = read_model(checkpoint, config)
    parts = parts_of(model, heads=heads is not None, units=units is not None)
    for option, wanted, last in (("--heads", heads, "out"), ("--units", units, "down")):
        if wanted and last not in map(_last, parts.values()):
            named = shown(shape.architecture)
            raise ConfigError(f"{option}: none are parts of ours in {named}; what can go, it alone knows")
    taken = {name: _taken((units if _last(of) == "down" else heads) or "", of, shape) for name, of in parts.items()}
    check_new(folder)
    with comparing(checkpoint, config) as text:
        with watched(parts) as importance:
            before = text.loss(model)
        kept = {
            name: importance[name].argsort(descending=True, stable=True)[: of.number - taken[name]].sort().values
            for name, of in parts.items()
        }
        shape, weights = without(model.cpu(), parts, kept)
        smaller = config.model_copy(update={"model": shape})
        measured = export_smaller(checkpoint, smaller, weights, folder, (model, before), text)
    return Shrunk([_told(name, of, len(kept[name]), shape) for name, of in parts.items()], *measured)


def parts_of(model: TokenModel, *, heads: bool, units: bool) -> dict[str, Removable]:
    """By the name of the module, what can be taken out of a model."""
    shape, found = model.config, dict[str, Removable]()
    assert isinstance(shape, TransformerConfig)
    for name, module in model.named_modules(remove_duplicate=False):
        if heads and isinstance(module, SelfAttention | CrossAttention):
            found[name] = Removable(module, module.out, module.attention.heads // shape.queries_per_kv_head)
        elif units and isinstance(module, FeedForward):
            found[name] = Removable(module, module.down, shape.hidden_width)
    return found


@contextmanager
def watched(parts: dict[str, Removable]) -> Iterator[dict[str, Tensor]]:
    """By name, the importance of each part in what has been read so far, [n] float64."""
    found = {name: torch.zeros(of.number, dtype=torch.float64) for name, of in parts.items()}

    def look(found: Tensor, of: Removable, module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).unflatten(-1, (of.number, of.size))
        weight = module.weight.detach().unflatten(1, (of.number, of.size))
        products = torch.einsum("cns,cnu->nsu", weight, weight)
        found += torch.einsum("tns,nsu,tnu->n", x, products, x).to(found.device, torch.float64)

    hooks = [of.reads.register_forward_pre_hook(partial(look, found[name], of)) for name, of in parts.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def without(
    model: TokenModel, parts: dict[str, Removable], kept: dict[str, Tensor]
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the model with the parts that are kept, by their numbers."""
    shape, weights, changes = model.config, dict(model.state_dict()), dict[str, Any]()
    assert isinstance(shape, TransformerConfig)
    left = dict(shape.heads_left)
    for name, of in parts.items():
        for last, sizes in _maps(of, shape).items():
            for end in ("weight", "bias"):
                if (whole := weights.get(f"{name}.{last}.{end}")) is not None:
                    pieces = [piece.unflatten(0, (of.number, -1))[kept[name]] for piece in whole.split(sizes)]
                    weights[f"{name}.{last}.{end}"] = torch.cat([piece.flatten(0, 1) for piece in pieces])
        last = f"{name}.{_last(of)}.weight"
        weights[last] = weights[last].unflatten(1, (of.number, of.size))[:, kept[name]].flatten(1).contiguous()
        if isinstance(of.module, FeedForward):
            changes["ff_width"] = len(kept[name])
            continue
        for own, values in of.module.attention.mixer.named_parameters(f"{name}.attention.mixer"):  # one for each head
            weights[own] = values.detach().unflatten(0, (of.number, -1))[kept[name]].flatten(0, 1)
        if len(kept[name]) < of.number:
            left[of.module.attention.name] = len(kept[name]) * shape.queries_per_kv_head
    return type(shape).model_validate(shape.model_dump() | changes | {"heads_left": left}), weights


def _maps(of: Removable, shape: TransformerConfig) -> dict[str, list[int]]:
    """The maps that make what the parts read of, by their last names: outputs, each of all parts."""
    inner, keys = of.reads.in_features, of.reads.in_features // shape.queries_per_kv_head
    if isinstance(of.module, FeedForward):
        return {"up": [inner] * (2 if shape.ff == "swiglu" else 1)}
    if isinstance(of.module, CrossAttention):
        return {"query": [inner], "key_value": [keys, keys]}
    return {"qkv": [inner, keys, keys]}


def _last(of: Removable) -> str:
    return "down" if isinstance(of.module, FeedForward) else "out"


def _taken(asked: str, of: Removable, shape: TransformerConfig) -> int:
    """How many parts go. Raises ConfigError unless it is one at least, and one stays."""
    ff = isinstance(of.module, FeedForward)
    option, each = ("--units", 1) if ff else ("--heads", shape.queries_per_kv_head)
    try:
        amount = float(asked)
    except ValueError:
        amount = -1.0
    number = amount if amount >= 1 else amount * of.number * each
    if not amount > 0 or number != number or (amount >= 1 and amount % 1):
        raise ConfigError(f"{option} {asked}: expected how many go of each, such as 2, or what share, such as 0.25")
    parts = int(number / each + 1e-9)
    if not 1 <= parts < of.number:
        shared = f", {each} of which share keys and values and go together" if each > 1 else ""
        name = "hidden units" if ff else "heads"
        raise ConfigError(
            f"{option} {asked}: {parts * each} would go of {of.number * each} {name}{shared}; one at least has to go, "
            "and one to stay"
        )
    return parts


def _told(name: str, of: Removable, kept: int, shape: TransformerConfig) -> str:
    """What stays of a module."""
    if isinstance(of.module, FeedForward):
        return f"{name}: {kept:,} of {of.number:,} hidden units stay"
    group = shape.queries_per_kv_head
    return f"{of.module.attention.name}: {kept * group} of {of.number * group} heads stay"
