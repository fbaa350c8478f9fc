"""The encoder-only baseline for masked language modelling, in the manner of BERT (Devlin et al. 2019).

The head is the tied table alone: no map before it, no bias.
"""

from torch import Tensor, nn

from model.architectures.blocks import EncoderLayer
from model.architectures.token_model import Embedded, LanguageModel, Transformed, one_stream
from model.config.model_config import ModelConfig


class EncoderOnly(LanguageModel):
    """L layers of self attention over all of the sequence, and feed forward."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))

    def transform(self, embedded: Embedded, keys: Tensor | None) -> Transformed:
        """Run the layers; see `LanguageModel.transform`."""
        return one_stream(self.layers, embedded, keys)
