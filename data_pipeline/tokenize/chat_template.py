"""Conversations as tokens: what stands around a message, which no text can forge, and what is to be written."""

import re
from collections.abc import Iterable

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.ingest.readers import ROLES, Message
from data_pipeline.ingest.sources import Turn
from data_pipeline.tokenize.tokenizer import Tokenizer

WRITTEN = "assistant"
"""The role whose messages are to be written; others are only read."""
_ROLE, _CONTENT, _EOS = "{role}", "{content}", "{eos}"


class ChatTemplate:
    """A template with a tokenizer. A message is a head, its content, and an end, whose first piece no text gives."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        """`text`: as `data.chat_template` has it. Raises DataError if the tokenizer cannot write it."""
        self.text = text
        self._tokenizer = tokenizer
        head, _, end = text.partition(_CONTENT)
        self._heads = {role: self._ids(head.replace(_ROLE, role)) for role in ROLES}
        self._end = self._ids(end)
        if not len(self._end) or int(self._end[0]) not in {*tokenizer.specials.values(), tokenizer.eos_id}:
            own = ", ".join(list(tokenizer.specials)[:8]) or "none"
            raise DataError(
                f"data.chat_template={text!r}: directly behind {{content}} stands no piece that no text gives, so a "
                f"text could end its turn; take {{eos}}, or one of the tokenizer's: {own}"
            )
        self.end_id = int(self._end[0])
        """The token with which a turn ends."""

    def framed(self, ids: np.ndarray, turn: Turn | None, ends: bool) -> np.ndarray:
        """Tokens of a stretch of a message, int64 [n], or of a plain text, with what stands around it there: marked, as
        a dataset stores them, if they are to be written. A plain text is, and ends with end-of-text if it `ends`."""
        mark = self._tokenizer.vocab_size
        if turn is None:
            return np.concatenate([ids, [self._tokenizer.eos_id][: int(ends)]]).astype(np.int64) + mark
        written = mark * (turn.role == WRITTEN)
        head = self._heads[turn.role][: None if turn.opens else 0]
        end = self._end[: None if turn.closes else 0]
        return np.concatenate([head, ids.astype(np.int64) + written, end[:1] + written, end[1:]])

    def prompt(self, messages: Iterable[Message]) -> np.ndarray:
        """Tokens of a conversation, int64 [n], up to where the assistant begins to speak."""
        found = []
        for role, content in messages:
            found += [self._heads[role], self._tokenizer.encode([content])[0], self._end]
        return np.concatenate([*found, self._heads[WRITTEN]]).astype(np.int64)

    def jinja(self) -> str:
        """The same for transformers, where a text that spells a special piece gives it."""
        head, _, end = self.text.replace(_EOS, self._tokenizer.piece(self._tokenizer.eos_id)).partition(_CONTENT)

        def joined(text: str, role: str) -> str:
            parts = [part for part in re.split(r"(\{role\})", text) if part]
            return " + ".join(role if part == _ROLE else _quoted(part) for part in parts)

        opening = joined(head, "message['role']")
        message = f"{opening} + message['content'] + {_quoted(end)}"
        return (
            f"{{% for message in messages %}}{{{{ {message} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {joined(head, _quoted(WRITTEN))} }}}}{{% endif %}}"
        )

    def _ids(self, text: str) -> np.ndarray:
        """Of text between messages, int64 [n], in which special pieces are those."""
        specials = {_EOS: self._tokenizer.eos_id, **self._tokenizer.specials}
        spelled = "|".join(re.escape(piece) for piece in sorted(specials, key=len, reverse=True))
        parts = [part for part in re.split(f"({spelled})", text) if part]
        found = [[specials[part]] if part in specials else self._tokenizer.encode([part])[0].tolist() for part in parts]
        ids = [token for of_part in found for token in of_part]
        if self._tokenizer.unk_id in ids:
            raise DataError(
                f"data.chat_template={self.text!r}: the tokenizer has no pieces for {text!r}; write it with characters "
                "that it knows"
            )
        return np.array(ids, np.int64)


def _quoted(text: str) -> str:
    """As a string of jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
