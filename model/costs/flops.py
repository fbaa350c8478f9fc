"""FLOPs per token, and the share of a device's peak that they are. Free of torch."""

from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.costs.totals import CostsUnknown, executed_flops, forward_flops, forward_only_flops, gated_flops
from model.gpus import peak_flops
from model.layers.block_sizes import pays


def forward_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """`forward_flops` over the tokens of a context; a whole number but for an encoder-decoder of two sequences."""
    return forward_flops(config, pairs) / config.context


def training_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """Three times the forward pass: the backward pass computes two products for each one (PaLM, appendix B).

    But for those that no gradient goes through.
    """
    return (3 * forward_flops(config, pairs) - 2 * forward_only_flops(config, pairs)) / config.context


def executed_flops_per_token(config: ModelConfig, pairs: bool = False, *, training: bool = False) -> float:
    """The same without closed blocks, at the density that is configured and where open blocks alone are computed.

    `training`: as `training_flops_per_token`; of gates whose training never leaves closed blocks out, all.
    """
    if not training:
        return executed_flops(config, pairs) / config.context
    if not isinstance(config, TransformerConfig) or config.block_gates.sparse_at(None):
        return (3 * executed_flops(config, pairs) - 2 * forward_only_flops(config, pairs)) / config.context
    return training_flops_per_token(config, pairs)


def trains_open_blocks(config: ModelConfig, tokens: int, *, compiled: bool, cuda: bool) -> bool:
    """Whether a micro-batch of so many tokens is trained by open blocks alone, once `train_sparse_after` is past."""
    if not isinstance(config, TransformerConfig) or not config.block_gates.sparse_at(None) or compiled:
        return False
    return pays(tokens, config.width, config.block_width, cuda=cuda)


def utilisation_per_token(config: ModelConfig, device_name: str, num_devices: int, pairs: bool = False) -> float | None:
    """Model FLOPs utilisation at one token per second over all devices; None for a device whose peak is not known, or
    an architecture whose FLOPs are not.

    The share of the devices' dense bf16 peak that the model itself needs ("MFU", PaLM, section 4.1).
    """
    peak = peak_flops(device_name)
    if peak is None:
        return None
    try:
        return training_flops_per_token(config, pairs) / (peak * num_devices)
    except CostsUnknown:
        return None


def gated_share(config: ModelConfig, pairs: bool = False) -> float:
    """Of the FLOPs of a token, the share that blocks with a gate have."""
    return gated_flops(config, pairs) / forward_flops(config, pairs)
