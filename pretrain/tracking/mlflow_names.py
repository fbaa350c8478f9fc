"""What the journal's names and values are in MLflow. Free of mlflow.

MLflow refuses some names. A character that it refuses is written as `-xHH-`, its number in hexadecimal: different names
stay different, and the name in the journal can be read from it. A name that MLflow takes stays as it is.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

from data_pipeline.secret import redact
from pretrain.metric_names import (
    BLOCK_PENALTY,
    DENSITY,
    ENCODER_LOSS,
    ENTROPY,
    FLIPS,
    HOST_MEMORY,
    L0,
    L1,
    MASK_MEAN,
    MASK_SLOPE,
    MEMORY,
    MULTIPLIER,
    RANK_SPREAD,
    RESTARTS,
    SAMPLES_SEEN,
    TOKENS_PER_SECOND_PER_DEVICE,
    TOTAL_LOSS,
    VALIDATION,
    VALIDATION_DENSITY,
    VALIDATION_PERPLEXITY,
    Z_LOSS,
)
from pretrain.run.journal import Record

SECTIONS = {
    "time": "speed",
    "data": "training data",
    "health": "training health",
    "gate": "training masks",
    "penalty": "training masks",
    "system": "usage",
}
"""The run's page sorts its sections by name: `loss`, `optim`, `speed`, and then these."""
ATTEMPT = "training health/attempt"
"""Beside every record's points, at the same time and step: tells which of them a rollback superseded."""
NONFINITE = "training health/nonfinite_values"
SUMMARIES = {
    DENSITY,
    VALIDATION_DENSITY,
    MASK_MEAN,
    FLIPS,
    MULTIPLIER,
    MASK_SLOPE,
    ENTROPY,
    L0,
    BLOCK_PENALTY,
}
"""All that is sent of masks, unless all is asked for."""
FIRST_SECTIONS = {"data": "progress", "gate": "mask", "health": "progress", "penalty": "mask"}
FIRST_ATTEMPT, FIRST_NONFINITE = "progress/attempt", "progress/nonfinite_values"
NAME_LENGTH = 250
TEXT_LENGTH = 6000
"""Of a param's value; tags may be a little longer."""
MOST_NATS = 700.0
"""The exponential of more is no number."""
ADDED = {ENCODER_LOSS, Z_LOSS}
"""What the total loss holds beside the cross entropy and penalties."""
A_LAYER = re.compile(r"(gate|attention)/(\w+)/(\w+)/\d+(?:/h\d+)?")
"""Or a head of it."""
PART_OF = re.compile(r"(loss/val|loss/val_bits_per_byte|labels/val_f1|ponder/share|refine/change)/(.+)", re.DOTALL)
ESCAPED = re.compile(r"[^\w .:-]|-(?=x[0-9a-f])|^\.\.|^\.$")
"""In a part of a name. Slashes, too: MLflow's page makes sections of them. `-x` and a digit would read as an escape."""


class Names(NamedTuple):
    """What of a journal is sent, and under which names. A run keeps those it began with."""

    all_masks: bool = False
    """Everything about masks, and not only `SUMMARIES`."""
    first: bool = False
    """As the first version named it: everything, with doubles, in other sections, and no perplexity."""

    @property
    def attempt(self) -> str:
        """What a record's attempt is called."""
        return FIRST_ATTEMPT if self.first else ATTEMPT

    @property
    def nonfinite(self) -> str:
        """What the number of values that are left out is called."""
        return FIRST_NONFINITE if self.first else NONFINITE


NOW = Names()
"""What runs begin with."""


def shipped(record: Record, names: Names = NOW) -> dict[str, float]:
    """What MLflow gets of a record: values that are not finite would ruin its axes, so they are counted instead.

    Of the layers, if all masks are asked for, it gets least, mean and greatest; nan where one layer's is not finite.
    """
    single, sites = _plan(tuple(record.metrics), names)
    named = {there: record.metrics[name] for name, there in single}
    for site, layers in sites.items():
        values = [record.metrics[name] for name in layers]
        finite = all(map(math.isfinite, values))
        for word, summary in (("min", min), ("mean", fmean), ("max", max)):
            named[f"{site}_{word}"] = summary(values) if finite else math.nan
    if not names.first:
        if record.metrics.get(HOST_MEMORY) == record.metrics.get(MEMORY):  # of ranks without a GPU
            named.pop(mirrored(HOST_MEMORY), None)
        if (loss := named.get(VALIDATION, math.nan)) < MOST_NATS:
            named[VALIDATION_PERPLEXITY] = math.exp(loss)
    good = {name: value for name, value in named.items() if math.isfinite(value)}
    about = {names.attempt: float(record.attempt)}
    if len(good) < len(named):
        about[names.nonfinite] = float(len(named) - len(good))
    return about | good  # the last one is the record's own


@functools.lru_cache(maxsize=256)
def _plan(given: tuple[str, ...], names: Names) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """Of the names of a record, which most records share: each with its name in MLflow, and those of layers by site."""
    sites: dict[str, list[str]] = {}
    every = names.first or names.all_masks
    for name in given:
        if every and (part := A_LAYER.fullmatch(name)):
            sites.setdefault(mirrored(f"{part[1]}/{part[2]}_{part[3]}", names.first), []).append(name)
    twice = set() if names.first else _twice(given)
    single = [
        (name, mirrored(name, names.first))
        for name in given
        if name not in twice
        and not A_LAYER.fullmatch(name)
        and (every or name in SUMMARIES or not name.startswith(("gate/", "penalty/")))
    ]
    return single, sites


def _twice(given: tuple[str, ...]) -> set[str]:
    """Those that another name in the record, or a point beside it, tells of."""
    found: set[str] = {SAMPLES_SEEN, RESTARTS}
    if L1 in given and MASK_MEAN in given:
        found.add(L1)
    if not any(name in ADDED or name.startswith("penalty/") for name in given):
        found.add(TOTAL_LOSS)
    if RANK_SPREAD not in given:  # one rank
        found.add(TOKENS_PER_SECOND_PER_DEVICE)
    return found


@functools.cache
def mirrored(name: str, first: bool = False) -> str:
    """A metric's name in MLflow: of one section at most, and with a dot before a source's name or a number of steps."""
    if part := PART_OF.fullmatch(name):
        return _bounded_name(f"{part[1]}.{escaped(part[2])}")
    section, slash, rest = name.partition("/")
    if not (section and rest):
        return _bounded_name(escaped(name))
    sections = FIRST_SECTIONS if first else SECTIONS
    return _bounded_name(f"{sections.get(section, escaped(section))}{slash}{escaped(rest)}")


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


def about_start(start: Record) -> dict[str, str]:
    """The tags of an attempt: those that its journal has, and what MLflow's own columns are made of."""
    tags, fields = start.fields.get("tags", {}), start.fields
    known = {
        "mlflow.source.name": fields.get("command"),
        "mlflow.source.type": "JOB" if fields.get("job") else "LOCAL",
        "mlflow.source.git.commit": tags.get("git/commit"),
        "mlflow.user": fields.get("user"),
        "restarts": start.attempt - 1,
    }
    return {name: text(value) for name, value in (tags | known).items() if value is not None}


def description(lines: Iterable[str], start: Record | None) -> str:
    """What stands on top of the run's page: how it went, what it is, and the command."""
    config, fields = (start.fields.get("config", {}), start.fields) if start else ({}, {})
    facts = [
        str(config.get("model", {}).get("architecture", "")),
        f"{fields['parameters']:,} parameters" if "parameters" in fields else "",
        f"data {config['data'].get('path')}" if "data" in config else "",
        f"{fields['world_size']} rank(s), {fields.get('device')}" if "world_size" in fields else "",
    ]
    command = f"`{fields['command']}`" if fields.get("command") else ""
    return text("\n\n".join(filter(None, [*lines, ", ".join(filter(None, facts)), command])))


def drift_tag(param: str) -> str:
    """The tag that tells of a param which differs in a later attempt."""
    return _bounded_name(f"drift/{param}")


def _bounded_name(name: str) -> str:
    """Too long a name ends in a hash of it."""
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[:225]}-x-{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"
