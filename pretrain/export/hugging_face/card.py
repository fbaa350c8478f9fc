"""The model card of an export, README.md: what the run says about the model, and how to use it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.storage.dataset import Dataset

LICENSE = "<!-- LICENSE: say under which licence the weights may be used, here and as `license:` at the top. -->"
LOSSES = ("validation loss", "bits per byte")
"""Rows about the held-out text."""
_CAUSAL = """model = AutoModelForCausalLM.from_pretrained(FOLDER{trusted})
batch = tokenizer(["Once"], return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, max_new_tokens=20{options})[0]))"""
_OTHERS = "model = {auto}.from_pretrained(FOLDER{trusted})"
_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [duet, {architecture}]
---

# {run}

{architecture}, {parameters:,} parameters, trained with Duet on {objective}.

| | |
|---|---|
{rows}

{license}

## Use

```python
from transformers import {auto}, AutoTokenizer
FOLDER = "this folder, or its name on a hub"
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trusted})
{use}
```

{notes}
"""


class CardFacts(NamedTuple):
    """What a card tells."""

    run: str
    architecture: str
    parameters: int
    objective: str
    task: str
    """As a hub calls it."""
    auto: str
    """The class of transformers that loads the model."""
    generates: bool
    cached: bool
    standard: bool
    """transformers has its code."""
    rows: Mapping[str, str]
    notes: Sequence[str]


def card(facts: CardFacts) -> str:
    """The text of README.md."""
    trusted = "" if facts.standard else ", trust_remote_code=True"
    use = _OTHERS.format(auto=facts.auto, trusted=trusted)
    if facts.generates:
        use = _CAUSAL.format(trusted=trusted, options="" if facts.cached else ", use_cache=False")
    rows = "\n".join(f"| {name} | {text} |" for name, text in facts.rows.items())
    notes = "\n".join(f"- {note}" for note in facts.notes)
    told = facts._asdict() | {"rows": rows, "notes": notes}
    return _CARD.format(license=LICENSE, use=use, trusted=trusted, **told)


def told_of_training(state: Mapping[str, Any], step: int, validation_loss: float | None) -> dict[str, str]:
    """Rows about a training, of what a checkpoint says of it."""
    rows = {"step": f"{step:,}", "tokens": f"{state.get('data', {}).get('tokens_seen', 0):,}"}
    if validation_loss is not None:
        rows["validation loss"] = f"{validation_loss:.4f} nats a label of the held-out text"
    return rows | {"commit of Duet": str(state.get("commit"))}


def told_of_data(dataset: Dataset | DataError, fingerprint: str | None, loss: float | None) -> dict[str, str]:
    """Rows about the data, which may be gone.

    Args:
        loss: nats for each token of the held-out text but the first; None if they are not all predicted.
    """
    rows = {"dataset": f"fingerprint {fingerprint}"}
    if isinstance(dataset, DataError):
        return rows
    rows["sources"] = ", ".join(
        f"{source.name} ({source.tokens['train']:,} tokens to train on)" for source in dataset.manifest.sources
    )
    held_out = dataset.manifest.splits["validation"]
    if loss is not None and held_out.bytes:
        bits = loss * (held_out.tokens - 1) / math.log(2) / held_out.bytes
        rows["bits per byte"] = f"{bits:.4f} of the held-out text"
    return rows
