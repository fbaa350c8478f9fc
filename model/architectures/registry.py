"""The architectures by name: from keys to a configuration, and from that to a model. Free of torch until it builds."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter, ValidationError, ValidationInfo

from data_pipeline.errors import ConfigError
from model.architectures import external
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig
from model.architectures.encoder_decoder.spec import EncoderDecoderConfig
from model.architectures.encoder_only.spec import EncoderOnlyConfig
from model.architectures.feedback.spec import FeedbackConfig
from model.architectures.parallel_encoder_decoder.spec import ParallelEncoderDecoderConfig
from model.architectures.refined.spec import RefinedConfig
from model.architectures.two_stream.spec import XLNetConfig
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


@runtime_checkable
class Assembled(Protocol):
    """A configuration that has a model of its own around its layers."""

    def assemble(self, backbone: "Callable[[], Backbone]") -> "TokenModel":
        """Tables first, then what `backbone` makes."""
        ...


DEFAULT = "parallel_encoder_decoder"
ARCHITECTURES: dict[str, type[ModelConfig]] = {
    DEFAULT: ParallelEncoderDecoderConfig,
    "decoder_only": DecoderOnlyConfig,
    "encoder_decoder": EncoderDecoderConfig,
    "encoder_only": EncoderOnlyConfig,
    "feedback": FeedbackConfig,
    "refined": RefinedConfig,
    "draft_and_verify": DraftAndVerifyConfig,
    "two_stream": XLNetConfig,
}
_GONE: dict[str, tuple[Any, str]] = {
    "streams": ("plain", "streams=batched was never faster, and is gone; leave model.streams out"),
}
"""Keys that older configurations hold: their old default, which is passed over, and what is said of another value."""
_ONLY = {"head": "labels are said by an encoder that reads a text both ways, model.architecture=encoder_only"}
"""Keys that one architecture alone has, and why."""


def class_of(architecture: str, sources: Iterable[Path] | None = None) -> tuple[str, type[ModelConfig]]:
    """The configuration class of an architecture, and what is written down of its name.

    Args:
        sources: folders of runs and exports where a copy of an architecture's source may lie; the source is run.
            None: no source is run, and a class holds the keys as they are.

    Raises:
        ValueError: there is none of that name, or its source is not one.
    """
    if architecture in ARCHITECTURES:
        if sources is not None and (point := external.installed().get(architecture)):
            raise ValueError(
                f"architecture={architecture}: an installed package has one of that name, too ({point.value}); "
                "uninstall it, or have it renamed"
            )
        return architecture, ARCHITECTURES[architecture]
    named = external.parse(architecture)
    if sources is not None and (named.file or named.name in external.installed()):
        return external.load(named, sources)
    if sources is None and (named.file or named.sha256):
        return architecture, external.Recorded
    known = ", ".join([*ARCHITECTURES, *external.installed()])
    raise ValueError(f"architecture={named.name}: not known; there are {known}, and FILE.py:NAME for a class in a file")


def configure(raw: Any, sources: Iterable[Path] | None = None) -> ModelConfig:
    """The configuration that keys and values make, of the class that `architecture` names.

    A key that the architecture lacks, but another one has, is passed over where it holds its default: so a preset of
    one goes under another, and what older versions wrote out in full is read.

    Args:
        sources: see `class_of`.

    Raises:
        ValueError: no such architecture; a value or a key that does not fit it.
    """
    if isinstance(raw, ModelConfig):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError("takes keys and values, such as `layers: 3`")
    name, chosen = class_of(str(raw.get("architecture", DEFAULT)), sources)
    if chosen is external.Recorded:
        return chosen.model_validate(raw)
    own = {key: value for key, value in raw.items() if not _is_foreign(key, value, chosen, name)}
    return chosen.model_validate(own if name in ARCHITECTURES else own | {"architecture": name})


def _field(raw: Any, info: ValidationInfo) -> ModelConfig:
    return configure(raw, (info.context or {}).get(SOURCES))


SOURCES = "sources"
"""In the context of a validation: what `class_of` takes."""
AnyModelConfig = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_field)]
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
    layers = partial(_backbone, config)
    return config.assemble(layers) if isinstance(config, Assembled) else TokenModel(config, layers)


def _backbone(config: Buildable) -> "Backbone":
    from model.architectures.backbone import Backbone

    made = config.build()
    if not isinstance(made, Backbone):
        raise ConfigError(
            f"{type(config).__name__}.build() gave a {type(made).__name__}, which is not a Backbone "
            "(model.architectures.backbone)"
        )
    return made


def _is_foreign(key: str, value: Any, chosen: type[ModelConfig], name: str) -> bool:
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
    if not at_default and key in _ONLY:
        raise ValueError(f"{key}: {_ONLY[key]}; leave it out")
    if not at_default:
        raise ValueError(f"{key}: {name.partition('@')[0]} {chosen.traits.lacks}; leave it out")
    return True
