"""Decoding strategies by name: how a model makes text."""

from typing import Protocol

from torch import Tensor

from data_pipeline.errors import ConfigError
from model.architectures.token_model import TokenModel
from model.config.model_config import ModelConfig
from model.generation.autoregressive import Autoregressive
from model.generation.refining import Refining
from model.generation.sampling import Sampling
from model.generation.texts import Drawn, Texts


class Decoding(Protocol):
    """A strategy at work on texts side by side; what it keeps of them is its own."""

    def __init__(self, model: TokenModel, sampling: Sampling) -> None:
        """`model`: in evaluation mode, of an architecture whose traits name the strategy."""

    def step(self, texts: Texts) -> Drawn:
        """The next tokens of the texts, at least one of each; they are added to them afterwards."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the texts, [B'] int64."""


DECODINGS: dict[str, type[Decoding]] = {"autoregressive": Autoregressive, "refining": Refining}


def decoding_of(config: ModelConfig, name: str | None = None) -> type[Decoding]:
    """The strategy of this name; the architecture's usual one unless given.

    Raises:
        ConfigError: the model cannot continue a prompt, or not in this way.
    """
    check_continues(config)
    names = config.traits.decodings
    if name is not None and name not in names:
        raise ConfigError(f"decoding={name}: {config.architecture} makes text by {' or '.join(names)}")
    return DECODINGS[name or names[0]]


def check_continues(config: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot continue a prompt."""
    if not config.causal and not config.traits.writes_targets:
        raise ConfigError(config.traits.why_not_continued)
