"""Conversations that a model goes on with."""

import json
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.readers import Message, ReadCounts, messages_of
from pretrain.inference.text import check_text

KEY = "messages"


def question(text: str) -> list[Message]:
    """A conversation that begins with what a user says. Raises ConfigError if it is no UTF-8."""
    return [Message("user", check_text(text, "a message"))]


def read_conversations(path: Path) -> list[list[Message]]:
    """A conversation on each line that is not empty: `{"messages": [{"role": …, "content": …}, …]}`.

    Raises:
        ConfigError: no such file, not UTF-8, or nothing in it.
        DataError: a line is no conversation in which the assistant's turn comes next.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --messages is a file with a conversation on each line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    found = [_conversation(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"{path}: no conversation in it; write one on each line")
    return found


def _conversation(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}, not an object with the key {KEY!r}")
    messages = messages_of(record, KEY, "strict", where, ReadCounts())
    if not messages or messages[-1].role == "assistant":
        raise DataError(f"{where}: the assistant speaks next, so end with a message of a user's, or the system's")
    return messages
