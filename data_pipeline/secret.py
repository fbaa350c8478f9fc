"""Secrets in URIs: what they look like, how they are refused, and how a text is shown without them.

Standard library only: every room may import this leaf.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
WAY_ON = (
    "a password, key or token does not belong in a URI, which is written into files and shown; give it by the "
    "environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, MLFLOW_TRACKING_TOKEN, or "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, for MLflow"
)
USER = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*):(?:"
    r"//(?![/\[])(?P<user>[^\s/?#]*)@"
    r"|/+(?!\[)(?P<with_slash>[^\s/?#@:]*:(?!\d+(?:[/?#\s]|$))\S*)@)",  # a key of S3 may hold a slash; not HOST:PORT/
    re.IGNORECASE,
)
WITHOUT_SECRETS = ("abfs", "abfss", "docker", "hdfs", "viewfs", "wasb", "wasbs")
"""Schemes with a container or a user's name before the `@`; a secret only follows a colon there."""
QUERY = re.compile(r"(?P<name>[?&;#][^\s=&;#?/]+)=(?P<value>[^\s&;#'\"]+)")
NAME = re.compile(
    r"token(?!i[sz])|secret|passw|pwd|passphrase|signature|credential|accesskey|authoriz|bearer|jwt|session"
    r"|(?:key|sig|sas|auth|pass)$"
)


def has_secret(text: str) -> bool:
    """Whether a URI in the text holds a password, a key or a token."""
    return redact(text) != text


def is_secret_name(name: str) -> bool:
    """Whether what is named so, in a query or in the environment, is most likely a secret."""
    return NAME.search(re.sub(r"[^a-z0-9]", "", unquote(name).lower())) is not None


def redact(text: str) -> str:
    """The text with what is secret in its URIs hidden; decoded, if that is where the secret is."""
    decoded = unquote(text)
    for form in (text, decoded) if decoded != text else (text,):
        shown = QUERY.sub(_without_value, USER.sub(_without_user, form))
        if shown != form:
            return shown
    return text


def key_of_secret(tree: Any, key: str = "") -> str | None:
    """The dotted key of the first text in a tree that holds a secret; None when there is none."""
    return next((redact(name) for name, value in _texts(tree, key) if has_secret(value)), None)


def argument_of_secret(arguments: Sequence[str], free: Sequence[str]) -> str | None:
    """Which argument of a command holds a secret: its key or option. What options of `free` take is any text."""
    before = ""
    for number, argument in enumerate(arguments, start=1):
        name, mark, _ = argument.partition("=")
        option = before if before.startswith("--") else f"argument {number}"
        if (name if mark else before) not in free and has_secret(argument):
            return name if mark and re.fullmatch(r"-{0,2}[\w.-]+", name) else option
        before = argument
    return None


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts of a tree, names included, each with its dotted key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield key, str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value, key)


def _without_user(found: re.Match[str]) -> str:
    user = found["user"] if found["user"] is not None else found["with_slash"]
    if user == HIDDEN or (found["scheme"].lower() in WITHOUT_SECRETS and ":" not in user):
        return found[0]
    return found[0].replace(f"{user}@", f"{HIDDEN}@")


def _without_value(found: re.Match[str]) -> str:
    return f"{found['name']}={HIDDEN}" if is_secret_name(found["name"]) else found[0]
