"""What a token costs in floating-point operations, and what a device can do in a second. Free of torch."""

from model.config import ModelConfig

_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets; for H100 and H200 the SXM boards."""
_OTHER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL", "MIG")


def forward_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of a forward pass over a full context, for each token of it; 2 for a multiplication with addition.

    Matrix products only, and attention over the full T x T square, of which a causal model needs half (the convention
    of PaLM, arXiv:2204.02311, appendix B). With L layers of width C, context T, vocabulary V, n sites of learned
    dropout in a layer:

        parallel encoder-decoder   2 (L (28 + 3 n) C² + C² + V C) + 4 (3 + n) L T C
        decoder only               2 (L (12 + 3 n) C² + V C)      + 4 (1 + n) L T C

    A mask costs its projection, 3 C², and one attention (docs/model.md B); the lone C² is the decoder's input map.
    """
    assert config.vocab_size is not None
    layers, width, sites = config.layers, config.width, len(config.dropout_sites)
    if config.architecture == "parallel_encoder_decoder":
        squares, attentions, input_map = 28, 3, width**2
    else:
        squares, attentions, input_map = 12, 1, 0
    products = layers * (squares + 3 * sites) * width**2 + input_map + config.vocab_size * width
    return 2 * products + 4 * (attentions + sites) * layers * config.context * width


def training_flops_per_token(config: ModelConfig) -> int:
    """Three times the forward pass: the backward pass computes two products for each one (PaLM, appendix B)."""
    return 3 * forward_flops_per_token(config)


def utilisation_per_token(config: ModelConfig, device_name: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation at one token per second over all devices; None for a device whose peak is not known.

    The share of the devices' dense bf16 peak that the model itself needs ("MFU", PaLM, section 4.1).
    """
    peak = peak_flops(device_name)
    return None if peak is None else training_flops_per_token(config) / (peak * num_devices)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name CUDA gives it; None for one that is not known here."""
    if any(board in device_name for board in _OTHER_BOARDS):
        return None
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)
