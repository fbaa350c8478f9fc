"""The files of a source, in an order that depends on names alone, and the shares of them that are worked on at once."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.config import LabelsConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import is_uri, open_raw, stamp
from data_pipeline.files.formats import check_packing, kind, packing
from data_pipeline.ingest.labels import LabelReader
from data_pipeline.ingest.listing import Listing
from data_pipeline.ingest.readers import Document, Errors, Labelled, Message, ReadCounts, plain_document, read_jsonl

CUT_RULE = "1 MiB, after the next newline or at 2 MiB"
"""How long documents are cut. Part of the fingerprint, since pieces are tokenized one by one."""
CUT_AFTER = 2**20
CUT_LIMIT = 2**21

_SHOWN_FILES = 10
UNIT_BYTES = 64 * 2**20
UNIT_FILES = 10_000
"""A unit of work gathers files up to this size and number; larger ones are divided where their format allows."""


class Turn(NamedTuple):
    """What a piece is of a message."""

    role: str
    opens: bool
    """It is the message's first."""
    closes: bool
    """It is the message's last."""


class Piece(NamedTuple):
    """A stretch of a document, never empty unless it is a message."""

    text: str
    data: bytes
    """The text in UTF-8."""
    continues: bool
    """Whether the next piece belongs to the same document."""
    ends_source: bool = False
    """Whether the next piece is the first of the target of a pair."""
    turn: Turn | None = None
    """Of a conversation."""
    known_by: bytes = b""
    """Of the first piece of a conversation, or of a pair with a prefix: what tells it from others. Of a question: the
    text that it is about, so that a text with all its questions stands on one side of the split."""
    labelled: Labelled | None = None
    """Of a text with labels, which is one piece."""


def cut(chunks: Iterable[str], after: int = CUT_AFTER, limit: int = CUT_LIMIT) -> Iterator[Piece]:
    """Cuts one document, given in chunks, after the first newline at or past byte `after` of a piece; if there is none
    before byte `limit`, at the last character boundary not past `limit`. How it is chunked makes no difference."""
    buffer = b""
    for chunk in chunks:
        buffer += chunk.encode()
        start = 0
        while (end := _cut_point(buffer, start, after, limit)) is not None:
            yield Piece(buffer[start:end].decode(), buffer[start:end], True)
            start = end
        buffer = buffer[start:]
    if buffer:
        yield Piece(buffer.decode(), buffer, False)


def pieces(document: Document, counts: ReadCounts, prefix: str = "", chat: bool = False) -> Iterator[Piece]:
    """A document in pieces; of a pair first the source, then the target. None of an empty one, or of half a pair.

    `prefix` stands before the source of a pair; `chat`: a pair is a question with its answer."""
    if document.labelled is not None:
        yield from _labelled(document.labelled)
    elif document.messages is not None:
        known_by = b"\0".join(part.encode() for message in document.messages for part in message)
        yield from _turns(document.messages, known_by)
    elif document.pair is None:
        yield from cut(document.chunks(counts))
    elif all(document.pair):
        source, target = document.pair
        known_by = source.encode() if chat or prefix else b""
        if chat:
            yield from _turns([Message("user", prefix + source), Message("assistant", target)], known_by)
            return
        for piece in cut([prefix + source]):
            yield piece._replace(continues=True, ends_source=not piece.continues, known_by=known_by)
            known_by = b""
        yield from cut([target])


def _labelled(labelled: Labelled) -> Iterator[Piece]:
    """The question, if there is one, and the text."""
    text = labelled.text.encode()
    if labelled.question:
        yield Piece(labelled.question, labelled.question.encode(), True, ends_source=True, known_by=text)
    if text:
        yield Piece(labelled.text, text, False, labelled=labelled)


def _turns(messages: Sequence[Message], known_by: bytes) -> Iterator[Piece]:
    for left, message in zip(range(len(messages) - 1, -1, -1), messages, strict=True):
        opens = True
        for piece in itertools.chain(cut([message.content]), [] if message.content else [Piece("", b"", False)]):
            turn = Turn(message.role, opens, not piece.continues)
            yield piece._replace(continues=piece.continues or left > 0, turn=turn, known_by=known_by)
            opens, known_by = False, b""


def _cut_point(buffer: bytes, start: int, after: int, limit: int) -> int | None:
    newline = buffer.find(b"\n", start + after, start + limit)
    end = newline + 1 if newline >= 0 else start + limit
    if end >= len(buffer):  # Nothing is known to follow, and a last piece must not continue.
        return None
    while buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


class Slice(NamedTuple):
    """A file, or a part of it: bytes of a JSONL file, row groups of a Parquet file."""

    name: str
    file: int
    """Number of the file in its source."""
    begin: int
    end: int | None
    """None: to the file's end."""
    bytes: int
    """What it adds to the input bytes that are done."""
    stamp: tuple[int, int]
    """Of the file, when the work was planned."""


class Unit(NamedTuple):
    """What one process works on at once: slices of one source."""

    number: int
    source: str
    slices: tuple[Slice, ...]

    @property
    def bytes(self) -> int:
        """Input bytes of the slices."""
        return sum(part.bytes for part in self.slices)

    @classmethod
    def load(cls, saved: list[Any]) -> "Unit":
        """What JSON made of a unit."""
        number, source, slices = saved
        parts = [(*part, (size, changed)) for *part, (size, changed) in slices]
        return cls(number, source, tuple(map(Slice._make, parts)))


class Source:
    """The files of one source: sorted by path, each once."""

    def __init__(self, name: str, key: str, config: SourceConfig) -> None:
        """`key`: where the paths stand in the configuration.

        Raises DataError as Listing does, and for a file that cannot be what its name says."""
        self.name = name
        self.config = config
        listing = Listing(key)
        for path in config.paths:
            listing.add(path)
        self.left_out = sorted(set(listing.left_out))
        """What the paths lead to but is not read, and why."""
        # A file that links lead to is read once, by the first of its names.
        names: dict[object, str] = {}
        for found in sorted(listing.files, key=_place):
            names.setdefault(found if is_uri(found) else Path(found).resolve(), found)
        self.files = list(names.values())
        self.stamps = [_recorded(found) for found in self.files]

    @property
    def input_bytes(self) -> int:
        """Size of the files as they lie on disk."""
        return sum(size for size, _ in self.stamps)

    def parts(self) -> Iterator[list[str]]:
        """All files in order, so many at once as make a unit of work."""
        group: list[str] = []
        gathered = 0
        for name, (size, _) in zip(self.files, self.stamps, strict=True):
            group.append(name)
            gathered += size
            if gathered >= UNIT_BYTES or len(group) == UNIT_FILES:
                yield group
                group, gathered = [], 0
        if group:
            yield group

    def slices(self) -> Iterator[list[Slice]]:
        """The slices of each unit of work, which together are all files in order."""
        group: list[Slice] = []
        gathered = 0
        for number, (name, recorded) in enumerate(zip(self.files, self.stamps, strict=True)):
            for part in _divide(name, number, recorded):
                if group and (gathered + part.bytes > UNIT_BYTES or len(group) == UNIT_FILES):
                    yield group
                    group, gathered = [], 0
                group.append(part)
                gathered += part.bytes
        if group:
            yield group


def _place(name: str) -> tuple[bool, tuple[str, ...]]:
    return is_uri(name), (name,) if is_uri(name) else Path(name).parts


def _recorded(name: str) -> tuple[int, int]:
    """The stamp of a file that is going to be read."""
    kind(name)
    try:
        recorded = stamp(name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    if packing(name) and not recorded[0]:
        check_packing(name, b"")
    return recorded


def named(what: str, source: str, places: list[str]) -> str:
    """A line that counts and names files of a source."""
    more = ", …" if len(places) > _SHOWN_FILES else ""
    return f"{what:<12} {source}: {len(places)}: {', '.join(places[:_SHOWN_FILES])}{more}"


def check_unchanged(name: str, recorded: tuple[int, int]) -> None:
    """Raises DataError if size or time of a file are not those that were recorded."""
    try:
        unchanged = stamp(name) == recorded
    except OSError:
        unchanged = False
    if not unchanged:
        raise DataError(f"{name} changed while it was read; let its writer finish and run the command again")


def _divide(name: str, number: int, recorded: tuple[int, int]) -> Iterator[Slice]:
    size = recorded[0]
    if size > UNIT_BYTES and not packing(name):
        if kind(name) == "jsonl":
            for begin in range(0, size, UNIT_BYTES):
                yield Slice(name, number, begin, min(begin + UNIT_BYTES, size), min(UNIT_BYTES, size - begin), recorded)
            return
        if kind(name) == "parquet":
            from data_pipeline.ingest.table_readers import parquet_groups, whole_spans

            for begin, end, part in whole_spans(parquet_groups(name), UNIT_BYTES):
                yield Slice(name, number, begin, end, part, recorded)
            return
    yield Slice(name, number, 0, None, size, recorded)


def documents(
    part: Slice, config: SourceConfig, errors: Errors, counts: ReadCounts, labels: LabelsConfig
) -> Iterator[Document]:
    """The documents of a slice, whose text is read when it is asked for. Raises DataError as the readers do."""
    match kind(part.name):
        case "plain" if config.target_key is not None:
            raise DataError(f"{part.name} is plain text, which holds no pairs: give JSONL, Parquet or Arrow")
        case other if config.messages_key is not None and other != "jsonl":
            raise DataError(f"{part.name}: conversations are read from JSON Lines: write one object a line")
        case other if labels.kind != "none" and other != "jsonl":
            raise DataError(f"{part.name}: texts with labels are read from JSON Lines: write one object a line")
        case "plain":
            yield plain_document(part.name, errors, config.text_key)
        case "jsonl":
            reader = None if labels.kind == "none" else LabelReader(labels, config, errors)
            more = (config.target_key, config.messages_key, reader)
            yield from read_jsonl(part.name, config.text_key, errors, counts, part.begin, part.end, *more)
        case table:
            from data_pipeline.ingest.table_readers import Columns, read_arrow, read_parquet

            language = (config.filter.language_key,) if config.filter.language is not None else ()
            texts = (config.text_key,) if config.target_key is None else (config.text_key, config.target_key)
            columns = Columns(part.name, texts, None if config.filter.function else language, errors)
            if table == "arrow":
                yield from read_arrow(columns, counts)
            else:
                yield from read_parquet(columns, counts, part.begin, part.end)


def hash_file(name: str, advance: Callable[[int], None]) -> tuple[int, str]:
    """Bytes and xxh3_64 of a file as it lies on disk; `advance` is told the bytes of every chunk."""
    digest, size = xxhash.xxh3_64(), 0
    with open_raw(name) as raw:
        while chunk := raw.read(2**20):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
    return size, digest.hexdigest()
