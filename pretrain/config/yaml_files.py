"""What YAML says, without what it may do to a reader."""

import re
from typing import Any

import yaml

MOST_VALUES = 1_000_000
"""Aliases can make a gigabyte of a line."""


_INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """YAML's own would take the second of two equal keys, silently, 1e-3 for a text, and 010 for 8.

    A whole number has one spelling here, so that none is lost where a name is wanted: 01 and 12:30 are texts. So is
    every key: 1e-2 and yes are names as they stand.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT, _TIME)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOATS = r"""
    [-+]?(?: [0-9][0-9_]*\.[0-9_]*(?:e[-+]?[0-9]+)? | \.[0-9][0-9_]*(?:e[-+]?[0-9]+)? | [0-9][0-9_]*e[-+]?[0-9]+ )$
    | [-+]?\.inf$ | \.nan$
"""
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(_FLOATS, re.VERBOSE | re.IGNORECASE), list("-+0123456789."))


def parse(text: str, name: str) -> Any:
    """The values of a text; `name` is what errors call it, with line and column.

    Raises:
        YAMLError: it is no YAML, has a key twice, or its aliases make more than MOST_VALUES of it.
        RecursionError: it is nested without end.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        tree = loader.get_single_data()
    finally:
        loader.dispose()
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        """Values in it, with those behind an alias each time."""
        if isinstance(node, dict | list) and id(node) not in sizes:
            sizes[id(node)] = 1 + sum(map(size, node.values() if isinstance(node, dict) else node))
        return sizes.get(id(node), 1)

    if size(tree) > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values of it")
    return tree
