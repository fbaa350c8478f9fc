"""Documents of a plain-text or JSONL file, with every fault named by file and place."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import CHUNK_BYTES, open_binary, open_raw
from data_pipeline.files.formats import HEAD_BYTES, check_head, check_plain

_BOM = "\ufeff"
"""At the head of a file it says that the file is UTF-8. It is no text there; anywhere else it is."""
MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a JSONL file, and longest text in a table: these are held in memory whole."""

Errors = Literal["strict", "replace"]
ROLES = ("system", "user", "assistant")


@dataclass
class ReadCounts:
    """What reading came to; filled while the text is consumed."""

    documents: int = 0
    """Documents with text."""
    bytes: int = 0
    """UTF-8 bytes of text."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    replaced: int = 0
    """Undecodable bytes and lone surrogates that became U+FFFD."""
    input_bytes: int = 0
    """Bytes taken from the files as they lie on disk (compressed, if they are)."""


class Message(NamedTuple):
    """What is said in a turn of a conversation."""

    role: str
    """One of ROLES."""
    content: str


class Stretch(NamedTuple):
    """Characters of a text that have a label."""

    start: int
    end: int
    label: int
    """Its number."""


class Labelled(NamedTuple):
    """A text and what is known of it."""

    text: str
    stretches: tuple[Stretch, ...]
    """Of a label that the text has as a whole, all of it."""
    elsewhere: int
    """The label of what none of them holds."""
    question: str = ""
    """To which the answer stands in the text."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that is about to be read."""

    place: int
    """Where it stands in its file: byte of the unpacked file, or row of the table."""
    number: int
    """Line or row, from 1, counted from where reading began."""
    chunks: Callable[[ReadCounts], Iterator[str]]
    """Its text, as often as it is called."""
    record: Mapping[str, Any]
    """The object or row it came in; empty for plain text."""
    pair: tuple[str, str] | None = None
    """Source and target, whose texts `chunks` gives one after the other."""
    messages: Sequence[Message] | None = None
    """Of a conversation, whose texts `chunks` gives one after the other."""
    labelled: Labelled | None = None
    """A text with labels; `chunks` gives the question before it, if there is one."""


def document_of(place: int, number: int, texts: Sequence[str], record: Mapping[str, Any]) -> Document:
    """Of its only text, or of source and target; a pair that lacks one of them counts as empty."""
    pair = (texts[0], texts[1]) if len(texts) == 2 else None
    chunks = texts if pair is None or all(pair) else ()
    return Document(place, number, lambda _: iter(chunks), record, pair)


def conversation_of(place: int, number: int, messages: Sequence[Message], record: Mapping[str, Any]) -> Document:
    """Of these messages; without any it counts as empty."""
    return Document(place, number, lambda _: iter([told.content for told in messages]), record, None, messages)


def labelled_of(place: int, number: int, labelled: Labelled, record: Mapping[str, Any]) -> Document:
    """Of a text with its labels; without a text it counts as empty."""
    texts = [part for part in (labelled.question, labelled.text) if part] if labelled.text else []
    return Document(place, number, lambda _: iter(texts), record, labelled=labelled)


def decode(data: bytes, final: bool, errors: Errors, where: object, offset: int, counts: ReadCounts) -> tuple[str, int]:
    """(text, bytes used) of UTF-8. Raises DataError that names the byte, counted from `offset`, if `strict`."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8: {error.reason}; "
                "convert the file, or set data.errors=replace to put U+FFFD in place of such bytes"
            ) from None
    # Each undecodable byte becomes one surrogate, which valid UTF-8 cannot contain: so they can be counted.
    text, used = codecs.utf_8_decode(data, "surrogateescape", final)
    text, replaced = re.subn("[\udc80-\udcff]", "\ufffd", text)
    counts.replaced += replaced
    return text, used


def plain_document(name: str, errors: Errors, text_key: str) -> Document:
    """A plain-text file: one document of any length. One of JSON objects with a `text_key` is none."""
    return Document(0, 1, lambda counts: read_plain(name, errors, counts, text_key), {})


def read_plain(name: str, errors: Errors, counts: ReadCounts, text_key: str = "text") -> Iterator[str]:
    """The text of a plain-text file in chunks, newlines untouched, without a byte order mark at its head.

    Raises DataError (file, byte offset) as `strict`, and for a file that begins as no plain text does."""
    with open_binary(name) as (file, raw):
        base, offset, pending, final = counts.input_bytes, 0, b"", False
        while not final:
            chunk = file.read(CHUNK_BYTES)
            counts.input_bytes = base + raw.tell()
            final = not chunk
            pending += chunk
            if offset == 0:
                check_head(name, pending[:HEAD_BYTES])
            text, used = decode(pending, final, errors, name, offset, counts)
            if offset == 0:
                text = text.removeprefix(_BOM)
                check_plain(name, text, text_key)
            pending, offset = pending[used:], offset + used
            if text:
                yield text


def read_jsonl(
    name: str,
    text_key: str,
    errors: Errors,
    counts: ReadCounts,
    begin: int = 0,
    end: int | None = None,
    target_key: str | None = None,
    messages_key: str | None = None,
    labels: Callable[[Mapping[str, Any], object, ReadCounts], Labelled] | None = None,
) -> Iterator[Document]:
    """The objects of the lines that start at byte `begin` or behind and before byte `end`; blank lines are no objects.

    Raises DataError that names file and line: no JSON object, no string under `text_key` (or `target_key`), no
    conversation under `messages_key` or nothing that `labels` can read, of which one is read instead, not UTF-8, or a
    line above MAX_LINE_BYTES. These are held in memory whole.
    """
    with open_binary(name) as (file, raw):
        base, offset, number = counts.input_bytes, begin, 0
        if begin:  # Only an unpacked file is read in parts.
            file.seek(begin - 1)
            offset += len(_line(file, begin - 1, _Line(name, 0, 0))) - 1
        while (end is None or offset < end) and (line := _line(file, offset, _Line(name, begin, number + 1))):
            number += 1
            where = _Line(name, begin, number)
            counts.input_bytes = base + raw.tell() - begin
            if offset == 0:
                check_head(name, line[:HEAD_BYTES])
            # Files that were put one behind the other have a mark within, where JSON allows none.
            text = decode(line, True, errors, where, offset, counts)[0].removeprefix(_BOM)
            if text and not text.isspace():
                record = _object(text, where)
                if messages_key is not None:
                    yield conversation_of(offset, number, _said(record, messages_key, errors, where, counts), record)
                elif labels is not None:
                    yield labelled_of(offset, number, labels(record, where, counts), record)
                else:
                    keys = (text_key,) if target_key is None else (text_key, target_key)
                    texts = [text_of(record, key, errors, where, counts) for key in keys]
                    yield document_of(offset, number, texts, record)
            offset += len(line)


def _said(record: Mapping[str, Any], key: str, errors: Errors, where: object, counts: ReadCounts) -> list[Message]:
    """A conversation to learn from. Raises DataError as `messages_of`, and if the assistant says nothing in it."""
    said = messages_of(record, key, errors, where, counts)
    if said and all(told.role != "assistant" for told in said):
        raise DataError(
            f"{where}: no message of {key!r} is the assistant's, so there is nothing to learn from it; make {key!r} "
            "null, which leaves the object out"
        )
    return said


@dataclass(frozen=True, slots=True)
class _Line:
    """How errors name a line. What it takes is done when it is needed."""

    name: str
    begin: int
    number: int

    def __str__(self) -> str:
        with open_raw(self.name) as file:
            before, left = 0, self.begin
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                before += chunk.count(b"\n")
                left -= len(chunk)
            if self.begin and not chunk.endswith(b"\n"):
                before += 1
        return f"{self.name}, line {before + self.number}"


def _line(file: BinaryIO, offset: int, where: _Line) -> bytes:
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{where} (at byte {offset}) is longer than {MAX_LINE_BYTES} bytes; is it JSON Lines, one object "
            "a line? Split larger documents, or store each as a plain-text file (these have no limit)"
        )
    return line


def _object(line: str, where: _Line) -> dict[str, Any]:
    try:
        record = json.loads(line)
        found = f"but a {type(record).__name__}"
    except (ValueError, RecursionError) as error:
        record, found = None, f"({error})"
    if not isinstance(record, dict):
        way_on = "jq -c '.[]'" if line.lstrip().startswith("[") else "jq -c ."
        raise DataError(
            f"{where} is not a JSON object {found}: {line[:80]!r}. JSON Lines have one object a line, which "
            f"`{way_on} FILE > NEW.jsonl` makes of other JSON; give a glob of the other files if this is none of them"
        )
    return record


def text_of(record: Mapping[str, Any], text_key: str, errors: Errors, where: object, counts: ReadCounts) -> str:
    """The text in a JSON object; null is none, as in a table, so that the document is dropped and counted.

    Raises DataError if there is no such key, or no string under it, and for half a surrogate pair if `strict`."""
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where} has no key {text_key!r}; its keys: {keys}. Set text_key (or target_key) of the source to one of "
            f"them; where only some objects lack it, give those {text_key!r}: null, which leaves them out"
        )
    text = record[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        strings = ", ".join(repr(key) for key, value in record.items() if isinstance(value, str)) or "none"
        raise DataError(
            f"{where}: {text_key!r} is a {type(text).__name__}, not a string; keys with strings: {strings}. Set "
            "text_key (or target_key) of the source to one of them; or make the value a string, or null, which leaves "
            "the object out"
        )
    return whole(text, text_key, errors, where, counts)


def messages_of(
    record: Mapping[str, Any], key: str, errors: Errors, where: object, counts: ReadCounts
) -> list[Message]:
    """The conversation in a JSON object; null, or a list of nothing, is none, so that it is dropped and counted.

    Raises DataError if there is no such key, or no list of objects with a role and a string as content under it, and
    for half a surrogate pair if `strict`."""
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where} has no key {key!r}; its keys: {keys}. Set messages_key of the source to one of them")
    if record[key] is not None and not isinstance(record[key], list):
        raise DataError(f"{where}: {key!r} is a {type(record[key]).__name__}, not a list of messages")
    found = []
    for number, item in enumerate(record[key] or [], 1):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} of {key!r} is {item!r:.80}, and not an object with role ("
                f"{', '.join(ROLES)}) and content, a string; mend it, or make {key!r} null, which leaves the object out"
            )
        found.append(Message(role, whole(content, key, errors, where, counts)))
    return found


def whole(text: str, key: str, errors: Errors, where: object, counts: ReadCounts) -> str:
    """Text that is UTF-8. Raises DataError for half a surrogate pair if `strict`."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: {key!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no "
                "text; mend the file, or set data.errors=replace to put U+FFFD in its place"
            ) from None
        text, replaced = re.subn("[\ud800-\udfff]", "\ufffd", text)
        counts.replaced += replaced
    return text
