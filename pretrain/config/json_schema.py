"""The JSON schema of a YAML file of a configuration, for editors: keys, kinds, defaults, and what each key means.

It is of one layer: no key must be there. What concerns several keys is checked when the layers are stacked.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel

from data_pipeline.counts import FORMS, PATTERN
from model.architectures.registry import ARCHITECTURES, DEFAULT
from model.config.model_config import ModelConfig
from pretrain.config.schema import Config

Schema = dict[str, Any]
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_COUNT = "count"
_LETTERED = {
    "type": "string",
    "pattern": f"^{PATTERN.pattern}$",
    "description": f"A whole number with a letter: {FORMS}.",
}


def json_schema() -> Schema:
    """Draft 2020-12."""
    describe()
    whole = Config.model_json_schema()
    parts: dict[str, Schema] = whole.pop("$defs")
    for name, kind in ARCHITECTURES.items():
        own = kind.model_json_schema()
        parts |= own.pop("$defs", {})
        parts[name] = own
    parts["model"] = _model(parts)
    del parts["ModelConfig"]
    whole["properties"]["model"] = {"$ref": "#/$defs/model"}
    told = {"$schema": _DIALECT, "title": "A configuration of Duet, or a layer of one"}
    return told | _as_written(whole) | {"$defs": _as_written(parts) | {_COUNT: _LETTERED}}


@cache
def describe() -> None:
    """Have each key's field say as its `description` what stands below the key in its class.

    pydantic can do so when a class is made (`use_attribute_docstrings`), in a twentieth of what `duet generate` takes
    before its model is loaded; and nobody else reads it.
    """
    for kind in dict.fromkeys(inner for outer in (Config, *ARCHITECTURES.values()) for inner in _sections(outer)):
        found: dict[str, str] = {}
        for base in reversed(kind.__mro__):
            if issubclass(base, BaseModel) and base is not BaseModel:
                found |= _below(base)
        for name, field in kind.model_fields.items():
            field.description = found.get(name)
        kind.model_rebuild(force=True)


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The classes in an annotation, those of keys before those that hold them."""
    for inner in get_args(kind):
        yield from _sections(inner)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for field in kind.model_fields.values():
            yield from _sections(field.annotation)
        yield kind


def _below(kind: type) -> dict[str, str]:
    """The text below each annotated name of a class."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        key.target.id: inspect.cleandoc(text.value.value)
        for key, text in pairwise(tree.body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _model(parts: dict[str, Schema]) -> Schema:
    """A model of any architecture: the keys of all of ours; of one from elsewhere, any."""
    properties: dict[str, Schema] = {}
    for name in ARCHITECTURES:
        for key, field in parts.pop(name)["properties"].items():
            kinds = properties.setdefault(key, field)
            if kinds != field and key != "architecture":
                properties[key] = {"anyOf": [*kinds.get("anyOf", [kinds]), field], "description": kinds["description"]}
    properties["architecture"] = {
        "anyOf": [{"enum": list(ARCHITECTURES)}, {"type": "string"}],
        "default": DEFAULT,
        "description": ModelConfig.model_fields["architecture"].description,
    }
    return {
        "type": "object",
        "description": "One of the architectures.",
        "properties": properties,
        "if": {"properties": {"architecture": {"enum": list(ARCHITECTURES)}}},
        "then": {"propertyNames": {"enum": sorted(properties)}},
    }


def _as_written(node: Any) -> Any:
    """As people write it: keys may be left out, whole numbers have a letter, a list of one needs no brackets."""
    if isinstance(node, list):
        return [_as_written(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    mine = {name: _as_written(value) for name, value in node.items() if name not in ("required", "title")}
    if isinstance(node.get("properties"), dict):  # a key may be called `title`
        mine["properties"] = {name: _as_written(field) for name, field in node["properties"].items()}
    if isinstance(mine.get("default"), dict):  # a section's: each of its keys says its own
        del mine["default"]
    if mine.get("type") == "integer":
        return _or(mine, {"$ref": f"#/$defs/{_COUNT}"})
    if mine.get("type") == "array" and "items" in mine:
        return _or(mine, mine["items"])
    return mine


def _or(kind: Schema, other: Schema) -> Schema:
    """Either; what is said of the key stays outside, where editors look for it."""
    outside: Schema = {name: kind[name] for name in ("description", "default") if name in kind}
    return {"anyOf": [{name: kind[name] for name in kind if name not in outside}, other], **outside}
