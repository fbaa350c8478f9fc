"""The parallel encoder-decoder (docs/model.md A): two causal streams over the same tokens, side by side.

Layer l of the decoder reads what layer l of the encoder gives; the encoder never reads the decoder.
"""

from torch import Tensor, nn

from model.blocks import DecoderLayer, EncoderLayer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers import Linear
from model.learned_dropout import Statistics


class ParallelEncoderDecoder(LanguageModel):
    """L encoder and L decoder layers; the decoder starts from a linear map of the embedded tokens."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        # The decoder has no residual path from the embeddings: a smaller start would starve it.
        std = config.decoder_input_std or config.width**-0.5
        self.decoder_input = Linear(config.width, config.width, bias=config.bias, std=std)
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))

    def transform(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """Run the layers; see `LanguageModel.transform`."""
        statistics: Statistics = {}
        encoder, decoder = x, self.decoder_input(x)
        for encoder_layer, decoder_layer in zip(self.encoder, self.decoder, strict=True):
            encoder, encoder_masks = encoder_layer(encoder, keys)
            decoder, decoder_masks = decoder_layer(decoder, encoder, keys)
            statistics |= encoder_masks | decoder_masks
        return decoder, statistics
