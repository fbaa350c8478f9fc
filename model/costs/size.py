"""How many parameters a model has, by arithmetic. Free of torch: login nodes count, too."""

from data_pipeline.errors import ConfigError
from model.config.model_config import NO_VOCABULARY, ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Those of the model that `registry.build` makes; the token table, which is also the head, once.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    width, bias = config.width, int(config.bias)
    keys = width // config.queries_per_kv_head
    pre_norm = config.norm_position == "pre"
    uses_next = config.add_next_position or config.subtract_next_position != "none"

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + bias) * outputs

    norm = width if config.norm == "rmsnorm" else width * (1 + bias)
    gates = 2 if config.ff == "swiglu" else 1
    feed_forward = linear(width, gates * config.hidden_width) + linear(config.hidden_width, width)
    attention = linear(width, width + 2 * keys) + linear(width, width)
    cross = linear(width, width) + linear(width, 2 * keys) + linear(width, width)
    layer = attention + feed_forward + 2 * norm
    decoder_layer = layer + cross + norm + pre_norm * norm
    count = config.vocab_size * width
    if config.positions == "learned":
        count += (config.context + uses_next) * width
    count += pre_norm * norm + (config.subtract_next_position == "layer_norm") * norm
    if not config.num_decoder_layers:
        count += config.layers * layer
    else:
        count += config.num_encoder_layers * layer + config.num_decoder_layers * decoder_layer
    if config.architecture == "parallel_encoder_decoder":
        count += linear(width, width) + config.decoder_input_norm * norm
    loss = config.encoder_loss
    if loss.kind != "none" and loss.affine:
        count += ((loss.embedding_norm != "none") + loss.output_norm) * 2 * width
    elementwise = config.learned_dropout.source == "elementwise"
    count += config.num_masks(config.dropout_sites) * (2 * width if elementwise else (3 * width + 1) * width)
    if config.dropout_sites and config.learned_dropout.source == "embed":
        count += 4 * width**2
    return count + config.num_masks(config.l0_sites) * width
