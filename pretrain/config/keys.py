"""The keys that a configuration can hold: what stands at a dotted place, and where a name occurs."""

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

Kind = Any
"""A type as a field is annotated with it."""


def plain(kind: Kind) -> Kind:
    """Without `Annotated`, and without None beside it."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return plain(next(arm for arm in get_args(kind) if arm is not type(None)))
    return kind


def keys_of(kind: Kind) -> Mapping[str, Kind]:
    """What stands below each key of a section; empty for what is none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: plain(field.annotation) for name, field in kind.model_fields.items()}
    return {}


class Keys:
    """Those of a configuration whose `model` section is of one class."""

    def __init__(self, root: type[BaseModel], model: type[BaseModel]) -> None:
        self._root = root
        self._model = model

    def below(self, kind: Kind, key: str) -> Kind:
        """What stands under a key of a section, of a dictionary or of a list; None for nothing that is known."""
        if kind is self._root and key == "model":
            return self._model
        if get_origin(kind) is dict:
            return plain(get_args(kind)[1])
        if get_origin(kind) in (list, tuple):
            return plain(get_args(kind)[0])
        return keys_of(kind).get(key)

    def at(self, location: Sequence[str]) -> Kind:
        """What stands at a place; None for nothing that is known."""
        kind: Kind = self._root
        for key in location:
            kind = self.below(kind, key)
        return kind

    def all(self) -> Iterator[str]:
        """Every dotted key; of what has names of a user's own, nothing below it."""
        yield from self._all(self._root, "")

    def _all(self, kind: Kind, prefix: str) -> Iterator[str]:
        for name in keys_of(kind):
            yield prefix + name
            yield from self._all(self.below(kind, name), f"{prefix}{name}.")
