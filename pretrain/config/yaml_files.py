"""What YAML says, without what it may do to a reader."""

from typing import Any

import yaml

MOST_VALUES = 1_000_000
"""Aliases can make a gigabyte of a line."""


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML's own loader would take the second, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """Its values.

    Raises:
        YAMLError: it is no YAML, has a key twice, or its aliases make more than MOST_VALUES of it.
        RecursionError: it is nested without end.
    """
    tree = yaml.load(text, _Loader)  # noqa: S506 - a safe one
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        """Values in it, with those behind an alias each time."""
        if isinstance(node, dict | list) and id(node) not in sizes:
            sizes[id(node)] = 1 + sum(map(size, node.values() if isinstance(node, dict) else node))
        return sizes.get(id(node), 1)

    if size(tree) > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values of it")
    return tree
