"""All text of a configuration with its split: which piece is for training, which is held out."""

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.files.formats import is_utf8
from data_pipeline.ingest.readers import Document, Labelled, ReadCounts
from data_pipeline.ingest.sources import Piece, Slice, Source, Turn, Unit, check_unchanged, documents, pieces

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
GIVEN = "split.files"
"""Name under which the manifest lists the files of `data.split.files`."""

Progress = Callable[[str, int, int], None]
"""Called often with (stage, input bytes done, input bytes in all)."""

EMPTY = "empty"
REASONS = ("", EMPTY, "min_chars", "max_chars", "language", "function", "duplicate", "near duplicate")
"""Why a document is left out; its place in this list is its verdict, 0 keeps it."""


class SplitPiece(NamedTuple):
    """A stretch of a document on one side of the split."""

    split: Split
    text: str
    data: bytes
    """The text in UTF-8."""
    starts: bool
    """Whether this is the document's first piece on this side."""
    ends: bool
    """Whether a text ends here: the document, or the source of a pair. A `tail` cut inside a document is not an end."""
    key: int
    """Where the document comes in a shuffle: uniform in 0 to 2^64 - 1, from its place in the source and the seed."""
    turn: Turn | None = None
    """Of a conversation."""
    labelled: Labelled | None = None
    """Of a text with labels; its question, if it has one, is a piece before."""


class Dropped(NamedTuple):
    """A document that was left out."""

    slice: int
    """Number of the slice in its unit."""
    number: int
    """Line or row, from 1, counted from the slice's beginning."""
    reason: str


class Corpus:
    """The sources of a configuration, in its order, and the units of work they make."""

    def __init__(self, config: DataConfig) -> None:
        """Raises DataError if there are no sources, a path is missing, the dataset would lie among what is read, or the
        task of held-out pairs is not said."""
        if not config.sources:
            raise DataError("data.sources is empty: name at least one, such as data.sources.text.paths=[FILE]")
        for name in config.sources:
            if name == GIVEN or not is_utf8(name):
                raise DataError(
                    f"data.sources: {name!r} cannot be a source's name (not UTF-8, or taken): choose another"
                )
        named = [name for name, source in config.sources.items() if source.prefix]
        if named and config.split.target_key is not None and config.split.prefix is None:
            raise DataError(
                f"data.sources.{named[0]}.prefix names a task, and data.split.files would be read without one: set "
                "data.split.prefix, or \"data.split.prefix=''\" if their texts begin with it"
            )
        self.config = config
        self.sources = [Source(name, f"data.sources.{name}.paths", source) for name, source in config.sources.items()]
        if config.split.rule == "given":
            self.sources.append(Source(GIVEN, "data.split.files", given_source(config)))
        self.input_bytes = sum(source.input_bytes for source in self.sources)
        for source in self.sources:
            _check_apart(config.path, source)

    def units(self) -> list[Unit]:
        """All units, in the order of their text. Raises DataError for a file whose footer cannot be read."""
        parts = ((source.name, tuple(slices)) for source in self.sources for slices in source.slices())
        return [Unit(number, name, slices) for number, (name, slices) in enumerate(parts)]


def _check_apart(built: str, source: Source) -> None:
    """Raises DataError if the dataset would lie in a folder that is read whole, as text of the next build."""
    place = Path(built).resolve()
    for path in source.config.paths:
        folder = Path(os.path.expanduser(path)).resolve()  # noqa: PTH111 (a name may begin with ~)
        inner = place.relative_to(folder).parts if place.is_relative_to(folder) else (".",)
        if not any(part.startswith(".") for part in inner):
            raise DataError(
                f"data.path={built} lies in {path}, all of which is read as text: the next build would read what "
                "this one writes; take a data.path elsewhere"
            )


def source_names(config: DataConfig) -> list[str]:
    """All sources, in the order of their streams."""
    return [*config.sources, *([GIVEN] if config.split.rule == "given" else [])]


def given_source(config: DataConfig) -> SourceConfig:
    """The held-out files as a source."""
    split = config.split
    keys = split.model_dump(include={"text_key", "target_key", "messages_key", "label_key", "question_key"})
    return SourceConfig(paths=split.files, prefix=split.prefix or "", **keys)


def source_config(config: DataConfig, name: str) -> SourceConfig:
    """The configuration of the source `name`, which may be GIVEN."""
    return given_source(config) if name == GIVEN else config.sources[name]


class UnitReader:
    """The text of a unit, with its split. Reading is repeatable: the same pieces every time."""

    def __init__(
        self,
        config: DataConfig,
        unit: Unit,
        advance: Callable[[int], None],
        verdicts: np.ndarray | None = None,
        train_bytes: int = 0,
    ) -> None:
        """`advance` is told of input bytes that were read.

        `verdicts`: an index into REASONS for each document, uint8, without which only empty ones are left out;
        `train_bytes`: with rule `tail`, how much of its text is for training."""
        self.counts = ReadCounts()
        self.dropped: list[Dropped] = []
        self.numbers: list[int] = []
        """Lines or rows of each slice."""
        self.kept: list[int] = []
        """Documents of each slice that are not dropped."""
        self._config = config
        self._unit = unit
        self._advance = advance
        self._verdicts = verdicts
        self._train_bytes = train_bytes

    def documents(self) -> Iterator[tuple[Slice, Document]]:
        """Every document, also those that are to be left out.

        Raises DataError as the readers do, and when a file changed meanwhile."""
        told = done = 0
        source = source_config(self._config, self._unit.source)
        for part in self._unit.slices:
            self.numbers.append(0)
            self.kept.append(0)
            for document in documents(part, source, self._config.errors, self.counts, self._config.labels):
                self.numbers[-1] = document.number
                yield part, document
                now = min(self.counts.input_bytes, done + part.bytes)
                if now > told:
                    self._advance(now - told)
                    told = now
            check_unchanged(part.name, part.stamp)
            done += part.bytes
            self.counts.input_bytes = done
            self._advance(done - told)
            told = done

    def pieces(self) -> Iterator[SplitPiece]:
        """The text that is kept. Raises DataError as the readers do."""
        config, pieces = self._config, self._pieces(source_config(self._config, self._unit.source).prefix)
        if config.split.rule == "hash":
            threshold = ceil(Fraction(str(config.split.fraction)) * 2**64)
            return _split_hash(pieces, config.seed, threshold)
        if config.split.rule == "given":
            return _label(pieces, "validation" if self._unit.source == GIVEN else "train")
        return _split_tail(pieces, self._train_bytes)

    def _pieces(self, prefix: str) -> Iterator[tuple[Piece, int]]:
        for number, (part, document) in enumerate(self.documents()):
            verdict = 0 if self._verdicts is None else int(self._verdicts[number])
            if not verdict:
                place = part.file.to_bytes(8, "little") + document.place.to_bytes(8, "little")
                key = xxhash.xxh3_64_intdigest(place, self._config.seed)
                empty = True
                for piece in pieces(document, self.counts, prefix, self._config.chat):
                    empty = False
                    self.counts.bytes += len(piece.data)
                    yield piece, key
                verdict = REASONS.index(EMPTY) if empty else 0
            if verdict:
                self.counts.dropped[REASONS[verdict]] += 1
                self.dropped.append(Dropped(len(self.numbers) - 1, document.number, REASONS[verdict]))
            else:
                self.counts.documents += 1
                self.kept[-1] += 1


def _label(pieces: Iterable[tuple[Piece, int]], split: Split) -> Iterator[SplitPiece]:
    starts = True
    for piece, key in pieces:
        ends = not piece.continues or piece.ends_source
        yield SplitPiece(split, piece.text, piece.data, starts, ends, key, piece.turn, piece.labelled)
        starts = not piece.continues


def _split_hash(pieces: Iterable[tuple[Piece, int]], seed: int, threshold: int) -> Iterator[SplitPiece]:
    """Held out if xxh3_64 of the document's first piece, or of what it is known by, is below `threshold`: exact
    duplicates stay on one side."""
    starts, split = True, SPLITS[0]
    for piece, key in pieces:
        if starts:
            split = SPLITS[xxhash.xxh3_64_intdigest(piece.known_by or piece.data, seed=seed) < threshold]
        ends = not piece.continues or piece.ends_source
        yield SplitPiece(split, piece.text, piece.data, starts, ends, key, piece.turn, piece.labelled)
        starts = not piece.continues


def _split_tail(pieces: Iterable[tuple[Piece, int]], train_bytes: int) -> Iterator[SplitPiece]:
    """The first `train_bytes` UTF-8 bytes (rounded down to a character) train, the rest is held out."""
    position = 0
    starts = dict.fromkeys(SPLITS, True)
    for piece, key in pieces:
        data = piece.data
        room = min(max(train_bytes - position, 0), len(data))
        while room < len(data) and data[room] & 0xC0 == 0x80:
            room -= 1
        position += len(data)
        for split, part in zip(SPLITS, (data[:room], data[room:]), strict=True):
            if part:
                ends = not piece.continues and (split == "validation" or room == len(data))
                yield SplitPiece(split, part.decode(), part, starts[split], ends, key)
                starts[split] = False
        if not piece.continues:
            starts = dict.fromkeys(SPLITS, True)
