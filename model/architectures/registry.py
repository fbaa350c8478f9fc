"""From a configuration to a model."""

from data_pipeline.errors import ConfigError
from model.architectures.decoder_only import DecoderOnly
from model.architectures.encoder_decoder import EncoderDecoder
from model.architectures.encoder_only import EncoderOnly
from model.architectures.parallel_encoder_decoder import ParallelEncoderDecoder
from model.architectures.token_model import LanguageModel
from model.config.model_config import NO_VOCABULARY, Architecture, ModelConfig

ARCHITECTURES: dict[Architecture, type[LanguageModel]] = {
    "parallel_encoder_decoder": ParallelEncoderDecoder,
    "decoder_only": DecoderOnly,
    "encoder_decoder": EncoderDecoder,
    "encoder_only": EncoderOnly,
}


def build(config: ModelConfig) -> LanguageModel:
    """A freshly initialised model, on torch's default device.

    Weights come from torch's global generator: call `torch.manual_seed` first, with the same seed on every rank.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    return ARCHITECTURES[config.architecture](config)
