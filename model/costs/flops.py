"""What a token costs in floating-point operations. Free of torch."""

from data_pipeline.errors import ConfigError
from model.config.model_config import NO_VOCABULARY, ModelConfig
from model.gpus import peak_flops


def sample_flops_by_part(config: ModelConfig, pairs: bool = False) -> dict[str, int]:
    """FLOPs of a forward pass over a sample of a full context; 2 for a multiplication with addition.

    Matrix products only, and attention over the full T x T square, of which a causal model needs half (the convention
    of PaLM, arXiv:2204.02311, appendix B). With width C, context T, vocabulary V, feed forward of width F (three maps
    for SwiGLU), and g heads of queries to one of keys, for each token:

        attention                  2 (2 + 2 / g) C² + 4 T C
        feed forward               2 (2 or 3) F C
        learned dropout, a mask    6 C² + 4 T C; nothing where it comes from the element alone (B1)
        its shared source          8 C² + 4 T C
        head                       2 V C

    An encoder layer, and one of a decoder-only model, has one attention, a decoder layer two; each has a feed forward.
    The decoder's input map adds 2 C². For L layers of the defaults that is

        parallel encoder-decoder   2 (L (28 + 3 n) C² + C² + V C) + 4 (3 + n) L T C    with n masks in a pair of layers
        decoder or encoder only    2 (L (12 + 3 n) C² + V C)      + 4 (1 + n) L T C    with n masks in a layer

    An encoder-decoder of two sequences reads S tokens and predicts U of them (`ModelConfig.lengths`); its cross
    attention costs 4 C² a token of U, 4 C² / g a token of S, and 4 S U C. Of `pairs` both are a full context.

    Returns:
        Parts as `model.parameters` names them; those that cost nothing here are not in it.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    width, sites = config.width, config.dropout_sites
    two_full = pairs and config.architecture == "encoder_decoder"
    inputs, targets = (config.context, config.context) if two_full else config.lengths
    square = 2 * width**2
    shared = square * 2 // config.queries_per_kv_head
    per_token = 2 * (3 if config.ff == "swiglu" else 2) * config.hidden_width * width

    def attention(layers: int, tokens: int) -> int:
        return layers * (tokens * (2 * square + shared) + 4 * tokens**2 * width)

    parts = {"token table": targets * 2 * config.vocab_size * width}
    if not config.num_decoder_layers:
        parts["layers: attention"] = attention(config.layers, inputs)
        parts["layers: feed forward"] = config.layers * inputs * per_token
    else:
        cross = targets * 2 * square + inputs * shared + 4 * inputs * targets * width
        parts["encoder: attention"] = attention(config.num_encoder_layers, inputs)
        parts["encoder: feed forward"] = config.num_encoder_layers * inputs * per_token
        parts["decoder: attention"] = attention(config.layers, targets)
        parts["decoder: cross attention"] = config.layers * cross
        parts["decoder: feed forward"] = config.layers * targets * per_token
    if config.architecture == "parallel_encoder_decoder":
        parts["decoder input"] = targets * square
    embedded = (inputs, targets) if config.architecture == "encoder_decoder" else (inputs,)
    if sites and config.learned_dropout.source != "elementwise":

        def masks(tokens: int) -> int:
            return tokens * 3 * square + 4 * tokens**2 * width

        on_inputs = config.num_masks(tuple(site for site in sites if site.startswith("enc_")))
        on_targets = config.num_masks(tuple(site for site in sites if site in ("dec_ff", "dec_sa", "cross")))
        on_embedded = sum(masks(tokens) for tokens in embedded) if "embed" in sites else 0
        parts["masks"] = on_inputs * masks(inputs) + on_targets * masks(targets) + on_embedded
        if config.learned_dropout.source == "embed":
            parts["mask source"] = sum(masks(tokens) + tokens * square for tokens in embedded)
    return parts


def forward_flops(config: ModelConfig, pairs: bool = False) -> int:
    """Of a sample: the sum of `sample_flops_by_part`."""
    return sum(sample_flops_by_part(config, pairs).values())


def forward_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """`forward_flops` over the tokens of a context; a whole number but for an encoder-decoder of two sequences."""
    return forward_flops(config, pairs) / config.context


def training_flops_per_token(config: ModelConfig, pairs: bool = False) -> float:
    """Three times the forward pass: the backward pass computes two products for each one (PaLM, appendix B)."""
    return 3 * forward_flops_per_token(config, pairs)


def utilisation_per_token(config: ModelConfig, device_name: str, num_devices: int, pairs: bool = False) -> float | None:
    """Model FLOPs utilisation at one token per second over all devices; None for a device whose peak is not known.

    The share of the devices' dense bf16 peak that the model itself needs ("MFU", PaLM, section 4.1).
    """
    peak = peak_flops(device_name)
    return None if peak is None else training_flops_per_token(config, pairs) / (peak * num_devices)
