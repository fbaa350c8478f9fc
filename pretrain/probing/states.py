"""The vectors of each stream behind each of its layers, taken by hooks from the pass that makes them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.feedback.model import FeedbackLayer
from model.architectures.token_model import TokenModel
from model.attention.visibility import CAUSAL, Visible
from model.batch import Batch

EMBEDDED = "embedded"
QUERIES = "queries"
_LAYERS = (EncoderLayer, DecoderLayer, FeedbackLayer)


class LayerState(NamedTuple):
    """A place where vectors are taken."""

    stream: str
    """As the model calls the list of its layers: `encoder`, `decoder`, `layers`; `embedded` before all of them;
    `queries` of a `two_stream`."""
    depth: int
    """Layers passed, each counted as often as it is passed, also where a token has halted before."""


@torch.no_grad()
def states(model: TokenModel, batch: Batch) -> dict[LayerState, Tensor]:
    """The vectors of each token, [B, T, C], at each state from which nothing to its right can be read.

    A stream that sees both ways, such as the encoder of `refined`, is left out: it reads what is to be predicted.

    Raises:
        ConfigError: the model has no layers of this house.
    """
    found: dict[str, list[Tensor]] = {}
    first: list[Tensor] = []
    backbone = model.backbone
    hooks = [
        layer.register_forward_hook(partial(_keep, found, name))
        for name, layer in backbone.named_modules()
        if isinstance(layer, _LAYERS)
    ]
    hooks.append(backbone.register_forward_pre_hook(lambda _, inputs: first.append(inputs[0].tokens)))
    try:
        model.hidden(batch.input_ids, None, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ConfigError(
            f"{model.config.architecture} has no stream to probe: its layers are none of model/architectures/blocks.py"
        )
    length = batch.input_ids.shape[1]
    return {LayerState(EMBEDDED, 0): first[0][:, :length]} | dict(_by_state(found, length))


def _keep(found: dict[str, list[Tensor]], name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    visible = next((given for given in inputs if isinstance(given, Visible)), CAUSAL)
    if visible.causal:
        found.setdefault(name, []).append(output if isinstance(output, Tensor) else output[0])


def _by_state(found: dict[str, list[Tensor]], length: int) -> Iterator[tuple[LayerState, Tensor]]:
    """Streams one after the other, from the first layer to the last."""
    streams: dict[str, list[list[Tensor]]] = {}
    for name, calls in found.items():
        if calls[0].shape[1] < length:  # token by token
            calls = [torch.cat(calls, dim=1)]
        streams.setdefault(name.split(".")[-2], []).append(calls)
    for stream, layers in streams.items():
        passes = [calls[number] for number in range(len(layers[0])) for calls in layers]
        for depth, output in enumerate(passes, 1):
            yield LayerState(stream, depth), output[:, :length]
        for depth, output in enumerate(passes, 1):
            if output.shape[1] > length:  # behind the tokens stand as many queries
                yield LayerState(QUERIES, depth), output[:, length:]
