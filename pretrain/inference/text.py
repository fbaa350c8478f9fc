"""Text that grows by tokens: shown as soon as it is certain, ended by stop strings."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import ConfigError


class GrowingText:
    """What a model writes, token by token.

    A character of several byte pieces waits until it is whole, and what may be the beginning of a stop string until it
    is not. The text ends before the first stop string.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """An empty text.

        Args:
            decode: of the tokenizer; the text of more tokens begins with that of fewer, but for a last character that
                is not whole.
            before: tokens that it goes on from; tokenizers leave out the space with which a text begins.

        Raises:
            ConfigError: a stop string is empty, or no text.
        """
        if "" in stops:
            raise ConfigError("an empty stop string would end every text before its first token")
        self._decode = decode
        self._stops = [check_text(stop, "a stop string") for stop in stops]
        self._tokens = list(before)
        self._shown = len(decode(before)) if before else 0
        self.ended = False
        """By a stop string."""

    def add(self, token: int) -> str:
        """The text that is certain with this token, and was not before."""
        self._tokens.append(token)
        return self._show(finished=False)

    def finish(self) -> str:
        """What still waits, now that no more comes."""
        return self._show(finished=True)

    def _show(self, *, finished: bool) -> str:
        if self.ended:
            return ""
        text = self._decode(self._tokens).rstrip("\ufffd")
        # What is shown holds no beginning of a stop string that could still become one.
        found = [at for stop in self._stops if (at := text.find(stop, self._shown)) >= 0]
        self.ended = bool(found)
        waiting = 0 if finished else max((_begun(text[self._shown :], stop) for stop in self._stops), default=0)
        shown, self._shown = self._shown, max(self._shown, min(found, default=len(text) - waiting))
        return text[shown : self._shown]


def check_text(text: str, what: str) -> str:
    """The text itself. Raises ConfigError, calling it `what`, for one that no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads a byte of an argument that is not UTF-8 as one of these.
        byte = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate"
        raise ConfigError(
            f"{what} holds {byte} (\\u{code:04x}) at character {error.start}: {text[:40]!a}; give it as UTF-8"
        ) from None
    return text


def read_prompts(path: Path) -> list[str]:
    """A prompt on each line that is not empty.

    Raises:
        ConfigError: no such file, not UTF-8, or nothing in it.
    """
    try:
        # Not splitlines: a form feed or U+2028 is a character of a prompt.
        prompts = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --prompts is a file with a prompt on each line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    if not prompts:
        raise ConfigError(f"{path}: no prompt in it; write one on each line")
    return prompts


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
