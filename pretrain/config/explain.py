"""What a configuration that is refused is told: where it was set, what is wrong, what would be right."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from data_pipeline.counts import FORMS
from pretrain.config.keys import Keys, keys_of
from pretrain.config.layers import Layer
from pretrain.config.other_words import OURS

_MOST_KEYS = 3
"""With the name that was given."""
_ALIKE = 0.75
"""From this ratio on a name is taken for a slip of the pen."""


def explain(detail: Any, stack: list[Layer], keys: Keys) -> str:
    """One of pydantic's errors in the user's terms."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        key = ".".join(location)
        return f"{origin(location, stack)}: unknown key {key}{_way_on(location, detail['input'], keys)}"
    if detail["type"] == "missing" and location[-1].isdecimal():  # of a pair, the second
        location = location[:-1]
    message = _expected(location, detail["type"], keys) or detail["msg"].removeprefix("Value error, ")
    # Our own messages name what they want named: a value may be a password.
    show = detail["type"] != "value_error" and not isinstance(detail["input"], dict | BaseModel)
    given = f" (given: {detail['input']!r})" if show else ""
    key = ".".join(location)
    return f"{origin(location, stack)}: {key + ': ' if key else ''}{message}{given}"


def origin(location: list[str], stack: list[Layer]) -> str:
    """Where a key was set last."""
    return next((layer.place for layer in reversed(stack) if layer.holds(location)), "configuration")


def _expected(location: list[str], error: str, keys: Keys) -> str | None:
    """What stands there, in plain words; None where pydantic's are good enough."""
    kind = keys.at(location)
    if get_origin(kind) is tuple and error in ("tuple_type", "missing", "too_long"):
        example = {float: "[0.9, 0.95]", int: "[10, 20]"}.get(keys.below(kind, "0"), "[a, b]")
        return f"expected {len(get_args(kind))} values in brackets, such as {example}"
    if error == "list_type":
        return "expected a value, or several in brackets, such as [a, b]"
    if error == "int_parsing":
        return f"expected {FORMS}"
    if error == "string_pattern_mismatch" and location == ["run", "name"]:
        return "expected letters, digits, `.`, `_` and `-`, the first a letter or digit; run.dir takes a path"
    if error in ("model_type", "dict_type") and keys_of(kind):
        return f"a section, and no value: its keys are {', '.join(f'{location[-1]}.{key}' for key in keys_of(kind))}"
    return None


def _way_on(location: list[str], given: Any, keys: Keys) -> str:
    """How a dotted key is written in a file, our key for what another trainer calls so, the key of that name elsewhere,
    or the nearest one."""
    sections = location[-1].split(".")
    if len(sections) > 1 and keys.at([*location[:-1], *sections]) is not None:
        return f"; in a file it is `{': {'.join(sections)}: …{'}' * (len(sections) - 1)}`"
    found = [_ours(word) for word in _words(location[-1], given) if word in OURS]
    if found:
        return "".join(found)
    section = ".".join(location[:-1])
    valid = [f"{section}.{key}" if section else key for key in keys_of(keys.at(location[:-1]))]
    near = difflib.get_close_matches(".".join(location), valid, n=1, cutoff=0.0)
    alike = near and difflib.SequenceMatcher(None, location[-1], near[0].rpartition(".")[2]).ratio() > _ALIKE
    same = [key for key in keys.all() if key.rpartition(".")[2] == location[-1]][:_MOST_KEYS]
    if same and not alike:
        return f"; did you mean {' or '.join(same)}?"
    return f"; nearest valid key: {near[0]}" if near else ""


def _words(key: str, given: Any) -> Iterator[str]:
    """A key that is not known, and those below it: a file of another trainer may have sections of its own."""
    yield key.lower()
    for inner, value in given.items() if isinstance(given, dict) else ():
        yield from _words(str(inner), value)


def _ours(word: str) -> str:
    key, note = OURS[word]
    return f"; {word} is {key} here{f' ({note})' if note else ''}"
