"""The decoder-only baseline, by default in the shape of GPT-2: learned positions, pre-norm, exact GELU, tied head."""

from torch import Tensor, nn

from model.architectures.blocks import EncoderLayer
from model.architectures.token_model import Embedded, LanguageModel, Transformed, one_stream
from model.config.model_config import ModelConfig


class DecoderOnly(LanguageModel):
    """L layers of causal self attention and feed forward."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        self.layers = nn.ModuleList(EncoderLayer(config, layer, alone=True) for layer in range(config.layers))

    def transform(self, embedded: Embedded, keys: Tensor | None) -> Transformed:
        """Run the layers; see `LanguageModel.transform`."""
        return one_stream(self.layers, embedded, keys)
