"""The JSON schema of a YAML file of a configuration, for editors: keys, kinds, defaults, and what each key means.

It is of one layer: no key must be there. What concerns several keys is checked when the layers are stacked.
"""

from typing import Any

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
