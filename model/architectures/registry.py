"""The architectures by name: from keys to a configuration, and from that to a model. Free of torch until it builds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.architectures.encoder_decoder.spec import EncoderDecoderConfig
from model.architectures.encoder_only.spec import EncoderOnlyConfig
from model.architectures.parallel_encoder_decoder.spec import ParallelEncoderDecoderConfig
from model.config.model_config import NO_VOCABULARY, ModelConfig

if TYPE_CHECKING:
    from model.architectures.backbone import Backbone
    from model.architectures.token_model import TokenModel


@runtime_checkable
class Buildable(Protocol):
    """A configuration that makes its layers."""

    def build(self) -> "Backbone":
        """Freshly initialised."""
        ...


DEFAULT = "parallel_encoder_decoder"
ARCHITECTURES: dict[str, type[ModelConfig]] = {
    DEFAULT: ParallelEncoderDecoderConfig,
    "decoder_only": DecoderOnlyConfig,
    "encoder_decoder": EncoderDecoderConfig,
    "encoder_only": EncoderOnlyConfig,
}
_GONE: dict[str, tuple[Any, str]] = {
    "streams": ("plain", "streams=batched was never faster, and is gone; leave model.streams out"),
}
"""Keys that older configurations hold: their old default, which is passed over, and what is said of another value."""


def class_of(architecture: str) -> type[ModelConfig]:
    """The configuration class of an architecture. Raises ValueError if there is none of that name."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture}: not known; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def configure(raw: Any) -> ModelConfig:
    """The configuration that keys and values make, of the class that `architecture` names.

    A key that the architecture lacks, but another one has, is passed over where it holds its default: so a preset of
    one goes under another, and what older versions wrote out in full is read.

    Raises:
        ValueError: no such architecture; a value or a key that does not fit it.
    """
    if isinstance(raw, ModelConfig):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError("takes keys and values, such as `layers: 3`")
    chosen = class_of(str(raw.get("architecture", DEFAULT)))
    return chosen.model_validate({key: value for key, value in raw.items() if not _is_foreign(key, value, chosen)})


AnyModelConfig = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(configure)]
"""A field of a configuration that holds a model of any architecture."""


def build(config: ModelConfig) -> "TokenModel":
    """A freshly initialised model, on torch's default device.

    Weights come from torch's global generator: call `torch.manual_seed` first, with the same seed on every rank.

    Raises:
        ConfigError: `vocab_size` is not known yet.
    """
    from model.architectures.token_model import TokenModel

    if config.vocab_size is None:
        raise ConfigError(NO_VOCABULARY)
    assert isinstance(config, Buildable)
    return TokenModel(config, config.build)


def _is_foreign(key: str, value: Any, chosen: type[ModelConfig]) -> bool:
    """Whether a key is another architecture's, at its default. Raises ValueError if it has another value."""
    if key in chosen.model_fields:
        return False
    if key in _GONE:
        default, reason = _GONE[key]
        if value != default:
            raise ValueError(reason)
        return True
    owner = next((other for other in ARCHITECTURES.values() if key in other.model_fields), None)
    if owner is None:
        return False
    field = owner.model_fields[key]
    try:
        kind: Any = field.annotation
        at_default = TypeAdapter(kind).validate_python(value) == field.default
    except ValidationError:
        at_default = False
    if not at_default:
        raise ValueError(f"{key}: {chosen.model_fields['architecture'].default} {chosen.traits.lacks}; leave it out")
    return True
