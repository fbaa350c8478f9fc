"""One page that shows generated texts: each token with its gates, its probability and what both streams attend to.

It needs nothing from anywhere; docs/generate.md says what a reader sees.
"""

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.files.atomic import disk_errors, write_atomic
from model.generation.inspection import attention_heads
from pretrain.inference.attention_rows import AttentionRows
from pretrain.inference.continuation import Continuation
from pretrain.inference.text_record import record
from pretrain.inference.trained import Trained

TOKENS = 10_000
"""That a page has room for."""
ATTENTION_BYTES = 6 * 2**20
"""For the attention of all texts together, before base64 makes four of three."""
_TEMPLATE = Path(__file__).with_suffix(".html")


def prepare(path: Path, continuation: Continuation) -> None:
    """See to it that a page can be written, before the texts are.

    Raises:
        ConfigError: it could not, or the texts may grow too long for it.
    """
    most = sum(len(text.prompt_ids) + continuation.settings.tokens for text in continuation.texts)
    if most > TOKENS:
        raise ConfigError(f"--html: a page has room for {TOKENS:,} tokens, these texts may be {most:,}; take --json")
    if path.is_dir():
        raise ConfigError(f"--html: {path} is a folder; name a file")
    with disk_errors(path, ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)


def records(trained: Trained, continuation: Continuation, *, attention: bool) -> list[dict[str, Any]]:
    """Of the finished texts, as `record` gives them; for a page with what they attend to."""
    found = []
    for number, text in enumerate(continuation.texts):
        rows, drafted = None, None
        if continuation.drafting and continuation.passes:
            drafted = continuation.drafting, continuation.passes[number]
        if attention:
            length = min(len(text.prompt_ids) + len(text.drawn), trained.model.config.context)
            heads = [] if trained.model.config.traits.two_sequences else attention_heads(trained.model)
            rows = AttentionRows(heads, length, ATTENTION_BYTES // len(continuation.texts))
        one = record(trained, text, number, continuation.settings, rows.add if rows else None, drafted)
        found.append(one | {"attention": rows.packed()} if rows else one)
    return found


def write_page(path: Path, found: list[dict[str, Any]]) -> None:
    """Replace the file by a page of `records` with their attention.

    Raises:
        ConfigError: the disk refuses.
    """
    # No text can end the element that holds it.
    data = json.dumps(found, allow_nan=False).replace("<", "\\u003c")
    with disk_errors(path, ConfigError):
        write_atomic(path, _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data))
