"""A chat template for transformers, where its tokenizer gives the tokens that the model has learned from."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.ingest.readers import ROLES, Message
from data_pipeline.tokenize.chat_template import ChatTemplate
from data_pipeline.tokenize.tokenizer import Tokenizer

_COMPARED = 64
"""Conversations, each of a held-out text."""


class ChatSettings(NamedTuple):
    """What an export has of conversations."""

    settings: dict[str, Any]
    """Of tokenizer_config.json."""
    note: str
    """Of the card."""
    end_id: int
    """The token that ends a turn, and so a text."""


def chat_settings(
    text: str, tokenizer: Tokenizer, fast: bytes | None, texts: Iterable[str] | DataError
) -> ChatSettings:
    """The template `text`, if `fast`, a tokenizer.json, gives our tokens with it; else how messages are written."""
    template = ChatTemplate(text, tokenizer)
    jinja = template.jinja()
    if fast is not None and not isinstance(texts, DataError) and _agrees(jinja, template, tokenizer, fast, texts):
        note = (
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` writes a conversation. In "
            "transformers a text that spells a special piece gives it, so take these out of what users write."
        )
        return ChatSettings({"chat_template": jinja, "split_special_tokens": False}, note, template.end_id)
    note = f"It has learned from messages that are written {text!r}."
    return ChatSettings({}, note, template.end_id)


def _agrees(jinja: str, template: ChatTemplate, tokenizer: Tokenizer, fast: bytes, texts: Iterable[str]) -> bool:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer as Fast

    made = Fast.from_str(fast.decode())
    rendering = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(jinja)
    compared = False
    for messages in islice(_conversations(texts, tokenizer), _COMPARED):
        asked = rendering.render(messages=[told._asdict() for told in messages], add_generation_prompt=True)
        if made.encode(asked, add_special_tokens=False).ids != template.prompt(messages).tolist():
            return False
        compared = True
    return compared


def _conversations(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[Message]]:
    """Of texts that spell no special piece, each as what all roles say: there may be but one."""
    for text in texts:
        if not any(piece in text for piece in tokenizer.specials):
            yield [Message(role, text) for role in ROLES]
