"""JSON files that carry a hash of themselves: one that was altered is damage, and never taken for something else.

The hash is the last key of the object, on a line of its own, and covers every byte before it. Standard library only.
"""

import hashlib
import json
from typing import Any

_KEY = b',\n "sha256": "'


def seal(content: str) -> str:
    """`content`, a JSON object that is indented by one, with its hash in it."""
    body = content.rstrip().removesuffix("}").rstrip()
    return f'{body}{_KEY.decode()}{_digest(body.encode())}"\n}}\n'


def unseal(content: bytes, needed: bool = False) -> tuple[Any, bool]:
    """What a JSON file holds, and whether it carries its hash; `needed`: it must.

    Raises ValueError if it does not match its hash, and for anything that is no JSON.
    """
    body, key, tail = content.rpartition(_KEY)
    if key and tail != f'{_digest(body)}"\n}}\n'.encode():
        raise ValueError("it does not match its own hash: it was altered, or cut off")
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if needed and not key:
        raise ValueError("its own hash is missing")
    return data, bool(key)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
