"""Which documents of a source are kept: by length, by language, and by a function of the user's."""

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
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
        if document.messages is not None:  # the same letters, said by others or told apart elsewhere, are no copy
            digest.update(repr([(told.role, len(told.content)) for told in document.messages]).encode())
        elif document.pair is not None:
            digest.update(b"%d" % len(document.pair[0]))
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


def filter_identity(config: FilterConfig, key: str) -> dict[str, Any]:
    """What is not as it is by default; of a function in a file its name and content, wherever the file lies.

    Raises DataError if the file cannot be read; `key` is where the filter stands in the configuration."""
    settings = config.model_dump(exclude_defaults=True)
    if config.function is not None and (file := _file(config.function)):
        digest = xxhash.xxh3_128(_read(file, f"{key}.function={config.function}")).hexdigest()
        settings["function"] = f"{file.name}:{config.function.rpartition(':')[2]} (xxh3 {digest})"
    return settings


def _load(name: str, key: str) -> Keep:
    module, _, function = name.rpartition(":")
    given = f"{key}={name}"
    try:
        if file := _file(name):
            found = getattr(_loaded(file, given), function)
        else:
            found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise DataError(f"{given}: {error}; is the module's folder in PYTHONPATH?") from error
    except AttributeError:
        raise DataError(f"{given}: {module} has no function {function!r}") from None
    if not callable(found):
        raise DataError(f"{given} is a {type(found).__name__}, not a function")
    return found


def _file(name: str) -> Path | None:
    """The file that the name of a function begins with; None where it is a module."""
    where = name.rpartition(":")[0]
    return Path(where) if where.endswith(".py") else None


def _read(file: Path, given: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{given}: {file.absolute()}: {error.strerror}") from error


def _loaded(file: Path, given: str) -> ModuleType:
    """The module in a file, once a process, under a name that no other has: its own may be that of a module of ours."""
    source = _read(file, given)
    name = f"_duet_filter_{xxhash.xxh3_128_hexdigest(source + bytes(file.absolute()))}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(file.absolute())
        try:
            exec(compile(source, file, "exec"), module.__dict__)  # noqa: S102 - what was hashed, not an old .pyc
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise DataError(f"{given}: {file}{_line(error, file)}: {error!r}") from error
    return sys.modules[name]


def _line(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""
