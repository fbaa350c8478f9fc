"""What an exported configuration needs of pydantic: its values were checked before they were exported.

Standard library only: a copy of this file lies in the exports, in the place of that package.
"""

import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["BaseModel", "ConfigDict", "Field", "field_validator", "model_validator"]
_NONE: Any = object()
ConfigDict = dict


class _Given(typing.NamedTuple):
    default: Any
    factory: Callable[[], Any] | None

    def value(self, name: str) -> Any:
        if self.factory is None and self.default is _NONE:
            raise ValueError(f"config.json: {name} is missing")
        return self.default if self.factory is None else self.factory()


def Field(default: Any = _NONE, *, default_factory: Callable[[], Any] | None = None, **_: Any) -> Any:  # noqa: N802
    """A default; bounds were checked."""
    return _Given(default, default_factory)


def model_validator(**_: Any) -> Callable[[Any], Any]:
    """Nothing is checked again."""
    return lambda check: check


def field_validator(*_: str, **__: Any) -> Callable[[Any], Any]:
    """Nothing is checked again."""
    return lambda check: check


class BaseModel:
    """Fields by their annotations, those of the bases first. Nobody changes an instance."""

    model_config: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Options are about checking."""

    def __init__(self, **values: Any) -> None:
        """Raises ValueError if a field without a default is missing."""
        for name, kind in _fields(type(self)).items():
            if name in values:
                value = _made(kind, values[name])
            else:
                default = getattr(type(self), name, _NONE)
                given = default if isinstance(default, _Given) else _Given(default, None)
                value = given.value(f"{type(self).__name__}.{name}")
            self.__dict__[name] = value

    @classmethod
    def model_validate(cls, raw: dict[str, Any]) -> Any:
        """An instance of what `model_dump` gave."""
        return cls(**raw)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """Names and values, inner ones included."""
        return {name: _plain(getattr(self, name)) for name in _fields(type(self))}

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Any:
        """With other values."""
        return type(self)(**{name: getattr(self, name) for name in _fields(type(self))} | (update or {}))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash((type(self), repr(self.model_dump())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_dump()})"


def _fields(kind: type) -> dict[str, Any]:
    """Annotations by name."""
    found = typing.get_type_hints(kind)
    return {
        name: of
        for name, of in found.items()
        if typing.get_origin(of) is not ClassVar and of is not ClassVar and not name.startswith("_")
    }


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _made(kind: Any, value: Any) -> Any:
    """A value of JSON as its annotation wants it: in its class, tuples for lists."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _made(args[0], value)
    if origin in (typing.Union, types.UnionType):
        return _made(_fitting(args, value), value)
    if isinstance(kind, type) and isinstance(value, dict) and issubclass(kind, BaseModel):
        return kind.model_validate(value)
    if isinstance(kind, type) and isinstance(value, list) and issubclass(kind, tuple):  # one with names
        return kind(*value)
    if isinstance(value, list):
        if origin is tuple and args and args[-1] is not ...:
            return tuple(map(_made, args, value))
        inner = args[0] if args else Any
        made = [_made(inner, item) for item in value]
        return {tuple: tuple, set: set, frozenset: frozenset}.get(origin, list)(made)
    if isinstance(value, dict) and len(args) == 2:
        return {key: _made(args[1], inner) for key, inner in value.items()}
    return value


def _fitting(kinds: tuple[Any, ...], value: Any) -> Any:
    """That of a union which a value is of: of several classes the first that has all its keys."""
    if isinstance(value, dict):
        classes = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fits = (kind for kind in classes if value.keys() <= _fields(kind).keys() and _tagged(kind, value))
        return next(fits, next((kind for kind in kinds if typing.get_origin(kind) is dict), Any))
    if isinstance(value, list):
        return next((kind for kind in kinds if typing.get_origin(kind) in (list, tuple, set, frozenset)), Any)
    return Any


def _tagged(kind: type, value: dict[str, Any]) -> bool:
    """Whether what a field of a class is fixed to, is its value."""
    return all(
        name not in value or value[name] in typing.get_args(of)
        for name, of in _fields(kind).items()
        if typing.get_origin(of) is typing.Literal
    )
