"""Keys of a configuration and their values, from the JSON schema that is shipped: quicker than asking the classes."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from duet_pretrain import SOURCE

Node = dict[str, Any]
"""A part of a JSON schema."""


class ConfigKeys:
    """What may be written before and behind the `=` of an override."""

    def __init__(self) -> None:
        self._schema: Node = json.loads((SOURCE / "configs" / "schema.json").read_bytes())

    def below(self, path: list[str]) -> dict[str, str]:
        """Names that may follow a key, and what each means; none behind one that has a value."""
        found = {name: node for form in self._at(path) for name, node in form.get("properties", {}).items()}
        return {name: next(filter(None, map(_about, self._forms(node))), "") for name, node in found.items()}

    def values(self, path: list[str]) -> list[str]:
        """Those that a key may have, and its default where that is none of them, as they are written."""
        listed, default = list[Any](), list[Any]()
        for form in self._at(path):
            kind = form.get("type")
            listed += form.get("enum", [])
            listed += [True, False] if kind == "boolean" else [None] if kind == "null" else []
            default += [form["default"]] if "default" in form else []
        written = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in listed + default)
        return list(dict.fromkeys(written))

    def known(self, key: str) -> bool:
        """Whether there is such a key."""
        return bool(self._at(key.split(".")))

    def _at(self, path: list[str]) -> list[Node]:
        """All that the schema says of a key."""
        forms = list(self._forms(self._schema))
        for name in path:
            children = [child for form in forms if (child := _child(form, name))]
            forms = [form for child in children for form in self._forms(child)]
        return forms

    def _forms(self, node: Node) -> Iterator[Node]:
        """The node, what it refers to, and its alternatives."""
        yield node
        if "$ref" in node:
            yield from self._forms(self._schema["$defs"][node["$ref"].rpartition("/")[2]])
        for other in node.get("anyOf", ()):
            yield from self._forms(other)


def dashed_key(words: Sequence[str]) -> str | None:
    """The first of the words that is a dotted key of ours behind two dashes, without them; None if none is."""
    names = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return next((name for name in names if "." in name and ConfigKeys().known(name)), None)


def _child(form: Node, name: str) -> Node | None:
    more = form.get("additionalProperties")  # names that the user gives, such as those of sources
    found: Node | None = form.get("properties", {}).get(name) or (more if isinstance(more, dict) else None)
    return found


def _about(form: Node) -> str:
    """The first sentence."""
    return " ".join(form.get("description", "").partition(". ")[0].split())
