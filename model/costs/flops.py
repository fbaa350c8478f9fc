"""FLOPs per token, and the share of a device's peak that they are. Free of torch."""

from model.config.model_config import ModelConfig
from model.costs.totals import CostsUnknown, forward_flops
from model.gpus import peak_flops


def forward_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """`forward_flops` over the tokens of a context; a whole number but for an encoder-decoder of two sequences."""
    return forward_flops(config, pairs) / config.context


def training_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """Three times the forward pass: the backward pass computes two products for each one (PaLM, appendix B)."""
    return 3 * forward_flops_per_token(config, pairs)


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
