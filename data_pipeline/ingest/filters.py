"""Which documents of a source are kept: by length, by language, and by a function of the user's."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import xxhash

from data_pipeline.config import FilterConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest.readers import MAX_LINE_BYTES, Document, ReadCounts
from data_pipeline.ingest.splits import REASONS

Keep = Callable[[str, Mapping[str, Any]], object]


class Facts(NamedTuple):
    """What is known of a document before it is decided on."""

    verdict: int
    """Index into REASONS."""
    size: int
    """UTF-8 bytes of its text."""
    digest: bytes
    """xxh3_128 of its text."""
    text: str
    """All of it if that was asked for and it is kept, else nothing."""


class Filter:
    """The filter of one source."""

    def __init__(self, config: FilterConfig, key: str, needs_text: bool) -> None:
        """`key`: where it stands in the configuration; `needs_text`: whether Facts are to hold the text.

        Raises DataError if the user's function cannot be found."""
        self._config = config
        self._key = key
        self._needs_text = needs_text
        self._function = _load(config.function, f"{key}.function") if config.function else None

    def facts(self, document: Document, where: str, counts: ReadCounts) -> Facts:
        """Reads the document. Raises DataError for one that is too long to be held in memory and has to be, and when
        the user's function fails."""
        config, digest = self._config, xxhash.xxh3_128()
        if config.language is not None and config.language_key not in document.record:
            raise DataError(f"{where} has no key {config.language_key!r}, which {self._key}.language looks at")
        holds = self._needs_text or self._function is not None
        kept: list[str] = []
        characters = size = 0
        for chunk in document.chunks(counts):
            encoded = chunk.encode()
            digest.update(encoded)
            characters += len(chunk)
            size += len(encoded)
            if holds:
                kept.append(chunk)
                if size > MAX_LINE_BYTES:
                    raise DataError(
                        f"{where} is longer than {MAX_LINE_BYTES} bytes, which {self._key}.function and "
                        "data.duplicates.rule=near cannot look at: split it, or leave it to a source without them"
                    )
        text = "".join(kept)
        reason = next(self._reasons(document.record, characters, text, where), "")
        verdict = REASONS.index(reason)
        return Facts(verdict, size, digest.digest(), "" if verdict or not self._needs_text else text)

    def _reasons(self, record: Mapping[str, Any], characters: int, text: str, where: str) -> Iterator[str]:
        config = self._config
        if not characters:
            yield "empty"
        if characters < config.min_chars:
            yield "min_chars"
        if config.max_chars is not None and characters > config.max_chars:
            yield "max_chars"
        if config.language is not None and record[config.language_key] != config.language:
            yield "language"
        if self._function is not None:
            try:
                kept = self._function(text, record)
            except Exception as error:
                raise DataError(f"{self._key}.function={config.function} failed on {where}: {error!r}") from error
            if not kept:
                yield "function"


def _load(name: str, key: str) -> Keep:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise DataError(f"{key}={name}: {error}; is the module's folder in PYTHONPATH?") from error
    except AttributeError:
        raise DataError(f"{key}={name}: {module} has no function {function!r}") from None
    if not callable(found):
        raise DataError(f"{key}={name} is a {type(found).__name__}, not a function")
    return found
