"""What the journal's names and values are in MLflow. Free of mlflow.

MLflow refuses some names. A character that it refuses is written as `-xHH-`, its number in hexadecimal: different names
stay different, and the name in the journal can be read from it. A name that MLflow takes stays as it is.
"""

import functools
import hashlib
import math
import re
from statistics import fmean
from typing import Any

from data_pipeline.secret import redact
from pretrain.run.journal import Record

SECTIONS = {"data": "progress", "gate": "mask", "health": "progress", "penalty": "mask"}
"""The run's page sorts its sections by name: so few of them, and none before the loss."""
ATTEMPT = "progress/attempt"
"""Beside every record's points, at the same time and step: tells which of them a rollback superseded."""
NONFINITE = "progress/nonfinite_values"
NAME_LENGTH = 250
TEXT_LENGTH = 6000
"""Of a param's value; tags may be a little longer."""
A_LAYER = re.compile(r"gate/(\w+)/(\w+)/\d+")
PART_OF = re.compile(r"(loss/val|loss/val_bits_per_byte|ponder/share)/(.+)", re.DOTALL)
ESCAPED = re.compile(r"[^\w .:-]|-(?=x[0-9a-f])|^\.\.|^\.$")
"""In a part of a name. Slashes, too: MLflow's page makes sections of them. `-x` and a digit would read as an escape."""


def shipped(record: Record) -> dict[str, float]:
    """What MLflow gets of a record: values that are not finite would ruin its axes, so they are counted instead.

    Of the layers it gets least, mean and greatest; nan where one layer's is not finite.
    """
    single, sites = _plan(tuple(record.metrics))
    named = {there: record.metrics[name] for name, there in single}
    for site, layers in sites.items():
        values = [record.metrics[name] for name in layers]
        finite = all(map(math.isfinite, values))
        for word, summary in (("min", min), ("mean", fmean), ("max", max)):
            named[f"{site}_{word}"] = summary(values) if finite else math.nan
    good = {name: value for name, value in named.items() if math.isfinite(value)}
    about = {ATTEMPT: float(record.attempt)}
    if len(good) < len(named):
        about[NONFINITE] = float(len(named) - len(good))
    return about | good  # the last one is the record's own


@functools.lru_cache(maxsize=256)
def _plan(names: tuple[str, ...]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """Of the names of a record, which most records share: each with its name in MLflow, and those of layers by site."""
    sites: dict[str, list[str]] = {}
    for name in names:
        if part := A_LAYER.fullmatch(name):
            sites.setdefault(mirrored(f"gate/{part[1]}_{part[2]}"), []).append(name)
    return [(name, mirrored(name)) for name in names if not A_LAYER.fullmatch(name)], sites


@functools.cache
def mirrored(name: str) -> str:
    """A metric's name in MLflow: of one section at most, and with a dot before a source's name or a number of steps."""
    if part := PART_OF.fullmatch(name):
        return _bounded_name(f"{part[1]}.{escaped(part[2])}")
    section, slash, rest = name.partition("/")
    if not (section and rest):
        return _bounded_name(escaped(name))
    return _bounded_name(f"{SECTIONS.get(section, escaped(section))}{slash}{escaped(rest)}")


def escaped(part: str) -> str:
    """A part of a name as MLflow takes it; another one for every other part."""
    return ESCAPED.sub(lambda refused: "".join(f"-x{ord(character):x}-" for character in refused[0]), part)


def text(value: object) -> str:
    """A param's or tag's value as MLflow takes it: without a secret, and cut with a word about it if it is too long."""
    whole = redact(str(value)).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if len(whole) <= TEXT_LENGTH:
        return whole
    end = f"… (cut: {len(whole):,} characters are in the run folder)"
    return whole[: TEXT_LENGTH - len(end)] + end


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as params: dotted keys, and text."""
    params: dict[str, str] = {}
    for name, value in tree.items():
        key = prefix + escaped(str(name))
        if isinstance(value, dict):
            params |= flat(value, f"{key}.")
        else:
            params[_bounded_name(key)] = text(value)
    return params


def drift_tag(param: str) -> str:
    """The tag that tells of a param which differs in a later attempt."""
    return _bounded_name(f"drift/{param}")


def _bounded_name(name: str) -> str:
    """Too long a name ends in a hash of it."""
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[:225]}-x-{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"
