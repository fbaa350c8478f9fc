"""What may change in the configuration of a run: each field says for itself (`data_pipeline.may_change`)."""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from data_pipeline.errors import ConfigError
from data_pipeline.may_change import MayChange
from model.architectures.external import is_external, shown
from model.config.model_config import ModelConfig
from pretrain.config.schema import ARCHITECTURE, Config, differences


def mark_of(field: FieldInfo) -> MayChange | None:
    """What a field says of itself; None when it may not change."""
    return next((mark for mark in field.metadata if isinstance(mark, MayChange)), None)


def refused(old: Config, new: Config, *, in_fork: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys that differ and must not when the run goes on, or `in_fork` of it, with both values.

    On resume `train.steps` is one, but may change while the learning rate has not depended on it (`RunFolder`).
    """
    marks = dict(_marks(old)) | dict(_marks(new))
    changed = differences(old, new)
    return {key: changed[key] for key in changed if not ((mark := marks[key]) and (in_fork or mark.on_resume))}


def refused_in_fork(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which a run may not differ from the one whose checkpoint it begins with.

    Another source of its architecture it may have: whether the weights fit is seen when they are read.
    """
    found = refused(old, new, in_fork=True)
    if all(is_external(name) for name in found.get(ARCHITECTURE, [])):
        found.pop(ARCHITECTURE, None)
    return found


def in_use(model: ModelConfig, assignments: Sequence[str]) -> ModelConfig:
    """A trained model's configuration with other values of keys that may change in use.

    Args:
        assignments: `model.KEY=VALUE` each.

    Raises:
        ConfigError: no assignment, a key that may not change, or a value that the model cannot have.
    """
    allowed = [key for key, mark in _marks(model, "model") if mark and mark.in_use]
    values = model.model_dump()
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as model.refine.steps=8")
        if key not in allowed:
            may = f"of {model.architecture} these may: {', '.join(allowed)}" if allowed else "no key of its model may"
            raise ConfigError(f"--set {key}: it may not change in a trained model; {may}")
        *way, name = key.split(".")[1:]
        section = reduce(getitem, way, values)
        section[name] = value
    try:
        return type(model).model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"--set {' '.join(assignments)}: {told}") from None


def told(changed: dict[str, tuple[Any, Any]]) -> str:
    """A line for each key of which a run has another value than now."""

    def value(key: str, given: Any) -> str:
        return shown(given) if key == ARCHITECTURE else repr(given)

    return "\n".join(
        f"  {key}: {value(key, old)} in the run, {value(key, new)} now" for key, (old, new) in changed.items()
    )


def keys_in_use(kind: type[BaseModel], key: str = "model") -> Iterator[str]:
    """Dotted keys of a model's configuration that may change in use."""
    for name, field in kind.model_fields.items():
        if (mark := mark_of(field)) and mark.in_use:
            yield f"{key}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_in_use(field.annotation, f"{key}.{name}")


def _marks(value: Any, key: str = "", mark: MayChange | None = None) -> Iterator[tuple[str, MayChange | None]]:
    """Of every dotted key that a configuration has; what is under a name in a dictionary has the dictionary's."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _marks(getattr(value, name), f"{key}.{name}" if key else name, mark_of(field))
    elif isinstance(value, dict) and value:
        for name, entry in value.items():
            yield from _marks(entry, f"{key}.{name}", mark)
    else:
        yield key, mark
