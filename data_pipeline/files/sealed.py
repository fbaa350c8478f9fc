"""JSON objects that carry a hash of themselves: one that was altered is damage, and never taken for something else.

The hash is the last key, and covers every byte before it. Standard library only.
"""

import hashlib
import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_atomic

_KEY = "sha256"
_SEAL = re.compile(rb',\n? "sha256": "([0-9a-f]{64})"\n?}\n?\Z')


def seal(content: str) -> str:
    """`content`, a JSON object on one line or indented by one, with its hash in it."""
    body = content.rstrip().removesuffix("}").rstrip()
    line = "\n" if "\n" in body else ""
    # What is not UTF-8 is refused, by the name of the file, when it is written.
    return f'{body},{line} "{_KEY}": "{_digest(body.encode("utf-8", "surrogatepass"))}"{line}}}{line}'


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file by a JSON object with its hash, indented for people."""
    write_atomic(path, seal(json.dumps(content, indent=1, ensure_ascii=False)))


def unseal(content: bytes, formats: Container[Any] | None = None) -> dict[str, Any]:
    """A JSON object, without its hash. Objects of `formats` have one, others may; without `formats`, all have.

    Raises ValueError if it does not match its hash or lacks it, and for anything that is no JSON object.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"holds {type(data).__name__}, expected a JSON object")
    told, mark = data.pop(_KEY, None), _SEAL.search(content)
    if told is not None and not (mark and _digest(content[: mark.start()]) == told):
        raise ValueError("it does not match its own hash: it was altered, or cut off")
    if told is None and (formats is None or data.get("format") in formats):
        raise ValueError("its own hash is missing")
    return data


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
