"""What several runs differ in: their settings, and whether their validation losses may be compared."""

import json
from typing import Any

import yaml

from model.architectures.external import shown
from pretrain.run.run_summary import RunData

NAMES = ("run.name", "run.dir")
"""Every run has another."""
OF_VALIDATION = ("model.context", "data.packing", "data.mask_boundaries", "data.objective", "model.document_mask")
"""What decides which labels are predicted, and from what."""
BUDGET = ("train.eval_tokens", "train.eval_every", "batch.tokens")
"""… beside these, where the last validation is over a part of the text."""
WHOLE_AT_END = "train.eval_whole_at_end"


def settings(runs: list[RunData]) -> list[dict[str, str]]:
    """The configuration of each run: dotted keys, and values as text."""
    found = []
    for run in runs:
        try:
            tree = yaml.load(run.config, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        except (yaml.YAMLError, RecursionError):
            tree = None
        found.append(_flat(tree) if isinstance(tree, dict) else {})
    return found


def differing(runs: list[RunData]) -> list[list[str]]:
    """A row for each key in which the runs differ: the key, and the value of each."""
    each = settings(runs)
    if not all(each):
        each = [one for one in each if one]
        if len(each) != len(runs):
            return []
    keys = dict.fromkeys(key for one in each for key in one)
    rows = [[key, *(one.get(key, "–") for one in each)] for key in keys if key not in NAMES]
    return [row for row in rows if len(set(row[1:])) > 1]


def warnings(runs: list[RunData]) -> list[str]:
    """Why the runs' losses in nats do not compare: they differ in data, tokenizer or validation."""
    found = []
    if len({fingerprint for run in runs if (fingerprint := _fingerprint(run))}) > 1:
        found.append(
            "These runs were trained on different datasets: nats per token do not compare, and bits per byte do only "
            "where the held-out text is the same."
        )
    if len({tokenizer for run in runs if (tokenizer := _tag(run, "dataset/tokenizer"))}) > 1:
        found.append("Their tokenizers differ: a token is not the same amount of text, bits per byte decide.")
    each = [one for one in settings(runs) if one]
    keys = [*OF_VALIDATION, WHOLE_AT_END]
    if any(one.get(WHOLE_AT_END) == "false" for one in each):
        keys += BUDGET
    if each and (changed := [key for key in keys if len({one.get(key, "–") for one in each}) > 1]):
        found.append(
            f"They were validated in different ways, by {', '.join(changed)}: the same text, but other labels."
        )
    return found


def _fingerprint(run: RunData) -> str | None:
    dataset = run.facts.get("dataset")
    return str(dataset.get("fingerprint")) if isinstance(dataset, dict) and dataset.get("fingerprint") else None


def _tag(run: RunData, name: str) -> str | None:
    tags = run.starts[-1].fields.get("tags") if run.starts else None
    return str(tags[name]) if isinstance(tags, dict) and name in tags else None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _shown(f"{prefix}{key}", value)
    return flat


def _shown(key: str, value: Any) -> str:
    """As in a configuration, but short where nobody reads all of it."""
    if key == "model.architecture":
        return shown(str(value))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
