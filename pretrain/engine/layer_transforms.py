"""What the engine does to each layer of a model without touching its parameters or their names."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from model.architectures.token_model import TokenModel


def layers(model: TokenModel) -> Iterator[nn.Module]:
    """The repeated parts: the members of the backbone's ModuleLists."""
    for child in model.backbone.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def checkpoint_activations(model: TokenModel) -> None:
    """Have every layer keep its input only; what it computes is computed again in the backward pass.

    The noise is a function of step and sample (model/layers/noise.py), so the second time gives the same.
    """
    for layer in layers(model):
        _recompute(layer)


def compile_layers(model: TokenModel) -> None:
    """Compile each layer in place (`torch.compile(model)` would rename all parameters)."""
    import torch._dynamo  # takes a second, which every command would pay

    found = list(layers(model))
    # Each layer is a variant of the same code; beyond the limit, torch would fall back to eager without a word.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(found))
    for layer in found:
        layer.compile()


def _recompute(layer: nn.Module) -> None:
    forward = layer.forward

    def recomputing(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False) if layer.training else forward(*args)

    layer.forward = recomputing
