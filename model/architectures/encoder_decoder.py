"""The encoder-decoder of two sequences, in the manner of T5 (Raffel et al. 2020, arXiv:1910.10683).

The encoder reads a text, all of it at every position; the decoder writes another, token by token: what is missing of
the first, or the target of a pair.
"""

from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from model.architectures.blocks import DecoderLayer, EncoderLayer
from model.architectures.token_model import LanguageModel, Transformed
from model.attention.visibility import visible_source, visible_target
from model.batch import Batch
from model.config.model_config import ModelConfig
from model.masks.sites import dropout_at


class EncoderDecoder(LanguageModel):
    """L encoder layers, then L decoder layers that each read the encoder's output. Both share the tables."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        self.target_dropout = dropout_at(config, "embed", 1)
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))

    def hidden(self, input_ids: Tensor, keys: Tensor | None, batch: Batch | None = None) -> Transformed:
        """What the head reads, [B, U, C], of `batch.decoder_input_ids` [B, U], with input_ids [B, S] read; both up to
        the context.

        Raises:
            ConfigError: there is nothing for the decoder to read.
        """
        if batch is None or batch.decoder_input_ids is None:
            raise ConfigError("encoder_decoder reads two sequences, and there is one only")
        within, across = visible_source(batch)
        source = self.embed(input_ids, keys, within, self.embed_dropout)
        statistics, read = source.statistics, source.tokens
        for layer in self.encoder:
            read, masks = layer(read, keys, source.mask_source, within)
            statistics = statistics | masks
        written = visible_target(batch)
        target = self.embed(batch.decoder_input_ids, keys, written, self.target_dropout)
        statistics, x = statistics | target.statistics, target.tokens
        for layer in self.decoder:
            x, masks = layer(x, read, keys, target.mask_source, written, across)
            statistics = statistics | masks
        return Transformed(self.final_norm(x), statistics, {})
