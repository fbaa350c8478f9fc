"""JSON records that carry their own hash: what a disk or a hand has altered is never taken for what was written."""

import hashlib
import json
from typing import Any

HASH = "sha256"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The record with its hash; `content` is JSON."""
    return content | {HASH: _hash(content)}


def unsealed(text: bytes, *, required: bool = False) -> dict[str, Any]:
    """What a record held when it was written.

    Raises:
        ValueError: it is damaged; or it has no hash, as older versions wrote it, and that is `required`.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds {type(content).__name__}, expected a JSON object")
    told = content.pop(HASH, None)
    if told is None and required:
        raise ValueError(f"has no {HASH}")
    if told is not None and told != _hash(content):
        raise ValueError(f"does not match its {HASH}: it was altered after it was written")
    return content


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
