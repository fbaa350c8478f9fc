"""What a token costs in floating-point operations, and what a device can do in a second. Free of torch."""

from data_pipeline.errors import ConfigError
from model.config import NO_VOCABULARY, ModelConfig

_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets; for H100 and H200 the SXM boards."""
_OTHER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL", "MIG")


def forward_flops_by_part(config: ModelConfig) -> dict[str, int]:
    """FLOPs of a forward pass over a full context, for each token of it; 2 for a multiplication with addition.

    Matrix products only, and attention over the full T x T square, of which a causal model needs half (the convention
    of PaLM, arXiv:2204.02311, appendix B). With width C, context T, vocabulary V, feed forward of width F (three maps
    for SwiGLU), and g heads of queries to one of keys:

        attention                  2 (2 + 2 / g) C² + 4 T C
        feed forward               2 (2 or 3) F C
        learned dropout, a mask    6 C² + 4 T C; nothing where it comes from the element alone (B1)
        its shared source          8 C² + 4 T C
        head                       2 V C

    An encoder layer, and one of a decoder-only model, has one attention, a decoder layer two; each has a feed forward.
    The decoder's input map adds 2 C². For L layers of the defaults that is

        parallel encoder-decoder   2 (L (28 + 3 n) C² + C² + V C) + 4 (3 + n) L T C    with n masks in a pair of layers
        decoder only               2 (L (12 + 3 n) C² + V C)      + 4 (1 + n) L T C    with n masks in a layer

    Returns:
        Parts as `model.parameters` names them; those that cost nothing here are not in it.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    width = config.width
    square, weights = 2 * width**2, 4 * config.context * width
    attention = square * 2 + square * 2 // config.queries_per_kv_head + weights
    feed_forward = 2 * (3 if config.ff == "swiglu" else 2) * config.hidden_width * width
    layers = config.layers
    parts = {"token table": 2 * config.vocab_size * width}
    if config.architecture == "decoder_only":
        parts |= {"layers: attention": layers * attention, "layers: feed forward": layers * feed_forward}
    else:
        encoder = config.num_encoder_layers
        parts |= {"encoder: attention": encoder * attention, "encoder: feed forward": encoder * feed_forward}
        parts |= {"decoder: attention": layers * attention, "decoder: cross attention": layers * attention}
        parts |= {"decoder: feed forward": layers * feed_forward, "decoder input": square}
    if config.dropout_sites and config.learned_dropout.source != "elementwise":
        parts["masks"] = config.num_masks(config.dropout_sites) * (3 * square + weights)
    if config.dropout_sites and config.learned_dropout.source == "embed":
        parts["mask source"] = 4 * square + weights
    return parts


def forward_flops_per_token(config: ModelConfig) -> int:
    """The sum of `forward_flops_by_part`."""
    return sum(forward_flops_by_part(config).values())


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
