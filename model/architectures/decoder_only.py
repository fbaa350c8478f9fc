"""The decoder-only baseline, in the shape of GPT-2: learned positions, pre-norm, exact GELU, tied head."""

from torch import Tensor, nn

from model.blocks import EncoderLayer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.learned_dropout import Statistics


class DecoderOnly(LanguageModel):
    """L layers of causal self attention and feed forward."""

    def __init__(self, config: ModelConfig) -> None:
        """`config.vocab_size` is known."""
        super().__init__(config)
        self.layers = nn.ModuleList(EncoderLayer(config, layer, ff_site="dec_ff") for layer in range(config.layers))

    def transform(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Statistics]:
        """Run the layers; see `LanguageModel.transform`."""
        statistics: Statistics = {}
        for layer in self.layers:
            x, masks = layer(x, keys)
            statistics |= masks
        return x, statistics
