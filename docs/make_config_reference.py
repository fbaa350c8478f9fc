"""Write docs/config.md and configs/schema.json from the typed configuration: every key, its kind, its default and what
it means.

python docs/make_config_reference.py
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.architectures.registry import ARCHITECTURES, DEFAULT
from model.config.model_config import ModelConfig
from pretrain.config.changes import mark_of
from pretrain.config.json_schema import describe, json_schema
from pretrain.config.schema import Config
from pretrain.objectives.registry import OBJECTIVES

OUT = Path(__file__).with_name("config.md")
SCHEMA = Path(__file__).parent.parent / "configs" / "schema.json"
HEAD = """# Configuration reference

Generated from the code by `python docs/make_config_reference.py`; a test holds that it is up to date.

Defaults come first, then YAML files and presets in the order given, then `key=value` overrides. An unknown key is an
error that names the nearest valid one. How stacking works: [training.md](training.md).
`duet config show …` prints the result, `duet config presets` lists the presets that are shipped.

**May change**, the last column: *on resume*, when a run goes on, and in a fork (`duet train --from`), too; *in a fork*
only; or, where it is empty, never. *In use*: by `--set` of `duet eval` and `duet generate`, too, when it is trained.
[training.md](training.md#stopping-and-going-on) says what holds for each reason.
"""
COLUMNS = "| key | kind | default | meaning | may change |\n|---|---|---|---|---|"
SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def main() -> None:
    """Write the file."""
    OUT.write_text(reference(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")


def schema() -> str:
    """What the presets name in their first line."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def reference() -> str:
    """The whole page."""
    describe()
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        if name == "model":
            parts += _models()
            continue
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts.append(f"## {name}\n\n{_prose(section.__doc__)}\n")
        parts.append(COLUMNS)
        parts.extend(_row(key, leaf) for key, leaf in _leaves(name, section))
        parts.append("")
    return "\n".join(parts)


def _models() -> list[str]:
    """The keys that all architectures have, then those of each that has more."""
    of = {name: dict(_leaves("model", kind)) for name, kind in ARCHITECTURES.items()}
    shared = set.intersection(*(set(keys) for keys in of.values()))
    names = _either(of)
    parts = ["## model\n\nOne of the architectures: first the keys that all have, then those of each.\n"]
    parts.append(COLUMNS)
    meaning = _prose(ModelConfig.model_fields["architecture"].description)
    for key, field in of[DEFAULT].items():
        if key == "model.architecture":
            parts.append(f"| `{key}` | {names} | `{DEFAULT}` | {meaning} | |")
        elif key in shared:
            parts.append(_row(key, field))
    for name, keys in of.items():
        if own := [_row(key, field) for key, field in keys.items() if key not in shared]:
            parts.append(f"\n### Only `{name}`\n\n{_prose(ARCHITECTURES[name].__doc__)}\n")
            parts += [COLUMNS, *own]
    return [*parts, ""]


def _leaves(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if get_origin(inner) is dict and issubclass(get_args(inner)[1], BaseModel):
            yield from _leaves(f"{prefix}.{name}.NAME", get_args(inner)[1])
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaves(f"{prefix}.{name}", inner)
        else:
            yield f"{prefix}.{name}", field


def _row(key: str, field: FieldInfo) -> str:
    default = "**must be given**" if field.is_required() else f"`{_value(field.default)}`"
    kind, mark = f"{_kind(field.annotation)}{_bounds(field)}", mark_of(field)
    if key == "data.objective":
        kind = _either(OBJECTIVES)
    return f"| `{key}` | {kind} | {default} | {_prose(field.description)} |{f' {mark} ' if mark else ' '}|"


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return _either(arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"{_kind(arguments[1])} by name"
    if origin is tuple:
        return f"{len(arguments)} × {_kind(arguments[0])}"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _either(values: Iterable[object]) -> str:
    return " or ".join(f"`{value}`" for value in values)


def _bounds(field: FieldInfo) -> str:
    found = [f"{SIGNS[type(m)]} {_limit(m):g}" for m in field.metadata if type(m) in SIGNS]
    found += [f"at least {m.min_length}" for m in field.metadata if isinstance(m, MinLen)]
    return f", {' and '.join(found)}" if found else ""


def _limit(bound: Any) -> float:
    return float(next(iter(vars(bound).values())) if hasattr(bound, "__dict__") else getattr(bound, bound.__slots__[0]))


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{', '.join(repr(value).replace(chr(39), chr(34)) for value in default)}]"
    return "none" if default is None else str(default)


def _prose(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
