"""`duet submit --array`: one configuration for each value, or each combination of values. Free of torch."""

import itertools
import re

from data_pipeline.errors import ConfigError
from pretrain.config.schema import Config, load

_OTHERS = re.compile(r"[^A-Za-z0-9._-]+")
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
MOST = 1000
"""Runs of a sweep; Slurm's own limit is 1,001 elements unless the site has raised it."""


def expand(args: list[str], arrays: list[str]) -> list[Config]:
    """The configuration of each element, in order; the last key varies fastest.

    Each has a run folder `LABEL` in what would be the only run's, and a name `NAME-LABEL`; the label is made of the
    last words of the keys and their values, such as `lr-0.001_seed-2`.

    Raises:
        ConfigError: as `load`; an array that is not KEY=VALUE,VALUE; two elements of the same label; too many.
    """
    base = load(args)
    columns = [_parse(array) for array in arrays]
    rows = list(itertools.product(*columns))
    if len(rows) > MOST:
        raise ConfigError(f"--array: {len(rows)} runs; at most {MOST}")
    found: dict[str, Config] = {}
    for row in rows:
        label = "_".join(f"{key.rpartition('.')[2]}-{_OTHERS.sub('-', value).strip('-')}" for key, value in row)
        if label in found:
            raise ConfigError(f"--array: two runs would be called {label}; leave one of them out")
        config = load([*args, *(f"{key}={value}" for key, value in row)])
        run = {"name": f"{base.run.name}-{label}", "dir": str(base.run_dir / label)}
        found[label] = config.model_copy(update={"run": config.run.model_copy(update=run)})
    return list(found.values())


def _parse(array: str) -> list[tuple[str, str]]:
    key, mark, values = array.partition("=")
    if key in ("run.name", "run.dir"):
        raise ConfigError(f"--array {array}: each run gets a name and a folder of its own; vary another key")
    split = _split(values)
    if not mark or not key or not all(split):
        raise ConfigError(
            f"--array {array}: expected KEY=VALUE,VALUE, such as optimizer.lr=1e-3,3e-4 or run.seed=1,2,3"
        )
    return [(key, value) for value in split]


def _split(values: str) -> list[str]:
    """At commas, but not inside brackets: `[0.9,0.95],[0.9,0.99]` are two values."""
    parts, depth = [""], 0
    for letter in values:
        depth += _BRACKETS.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
