"""All text of a configuration with its split: which piece is for training, which is held out."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

import xxhash

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.readers import ReadCounts
from data_pipeline.sources import Piece, Source

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
GIVEN = "split.files"
"""Name under which the manifest lists the files of `data.split.files`."""

Progress = Callable[[str, int, int], None]
"""Called often with (stage, input bytes done, input bytes in all)."""


class SplitPiece(NamedTuple):
    """A stretch of a document on one side of the split."""

    split: Split
    text: str
    starts: bool
    """Whether this is the document's first piece on this side."""
    ends: bool
    """Whether the document ends here. A `tail` cut inside a document is not an end."""
    source: str


class Corpus:
    """The sources of a configuration, in its order. Reading is repeatable: the same pieces every time."""

    def __init__(self, config: DataConfig, progress: Progress | None = None) -> None:
        """Raises DataError if there are no sources or a path is missing."""
        if not config.sources:
            raise DataError("data.sources is empty: name at least one, such as data.sources.text.paths=[FILE]")
        self.config = config
        self.sources = [Source(name, f"data.sources.{name}.paths", source) for name, source in config.sources.items()]
        if config.split.rule == "given":
            given = SourceConfig(paths=config.split.files, text_key=config.split.text_key)
            self.sources.append(Source(GIVEN, "data.split.files", given))
        self.input_bytes = sum(source.input_bytes for source in self.sources)
        self._progress = progress
        self._text_bytes: dict[str, int] | None = None

    def report(self, stage: str, done: int) -> None:
        """Tells the progress callback, if there is one, that `done` input bytes are through `stage`."""
        if self._progress is not None:
            self._progress(stage, done, self.input_bytes)

    def inputs(self) -> list[list[tuple[str, int, str]]]:
        """For each source, (path, bytes, xxh3_64) of each of its files."""
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            self.report("hash", done)

        return [list(source.hashes(advance)) for source in self.sources]

    def pieces(self, stage: str, counts: dict[str, ReadCounts]) -> Iterator[SplitPiece]:
        """Every piece of every source. `counts` receives what was read, by source name.

        Raises DataError as the readers do, and when a file changed meanwhile.
        """
        if self.config.split.rule == "tail" and self._text_bytes is None:
            self._text_bytes = self._measure()
        for source, pieces in self._read(stage, counts):
            if self.config.split.rule == "hash":
                threshold = Fraction(str(self.config.split.fraction)) * 2**64
                yield from _split_hash(pieces, self.config.seed, threshold, source.name)
            elif self.config.split.rule == "given":
                yield from _label(pieces, "validation" if source.name == GIVEN else "train", source.name)
            else:
                assert self._text_bytes is not None
                share = 1 - Fraction(str(self.config.split.fraction))
                yield from _split_tail(pieces, int(self._text_bytes[source.name] * share), source.name)

    def _read(self, stage: str, counts: dict[str, ReadCounts]) -> Iterator[tuple[Source, Iterator[Piece]]]:
        done = 0
        for source in self.sources:
            tally = counts[source.name] = ReadCounts()
            yield source, self._watched(source.pieces(self.config.errors, tally), stage, done, tally)
            source.check_unchanged()
            done += tally.input_bytes

    def _watched(self, pieces: Iterator[Piece], stage: str, before: int, tally: ReadCounts) -> Iterator[Piece]:
        for piece in pieces:
            self.report(stage, before + tally.input_bytes)
            yield piece

    def _measure(self) -> dict[str, int]:
        """UTF-8 bytes of text of each source."""
        counts: dict[str, ReadCounts] = {}
        for _, pieces in self._read("measure", counts):
            for _ in pieces:
                pass
        return {name: tally.bytes for name, tally in counts.items()}


def _label(pieces: Iterable[Piece], split: Split, source: str) -> Iterator[SplitPiece]:
    starts = True
    for piece in pieces:
        yield SplitPiece(split, piece.text, starts, not piece.continues, source)
        starts = not piece.continues


def _split_hash(pieces: Iterable[Piece], seed: int, threshold: Fraction, source: str) -> Iterator[SplitPiece]:
    """Held out if xxh3_64 of the document's first piece is below `threshold`: exact duplicates stay on one side."""
    starts, split = True, SPLITS[0]
    for piece in pieces:
        if starts:
            split = SPLITS[xxhash.xxh3_64_intdigest(piece.text.encode(), seed=seed) < threshold]
        yield SplitPiece(split, piece.text, starts, not piece.continues, source)
        starts = not piece.continues


def _split_tail(pieces: Iterable[Piece], train_bytes: int, source: str) -> Iterator[SplitPiece]:
    """The first `train_bytes` UTF-8 bytes (rounded down to a character) train, the rest is held out."""
    position = 0
    starts = dict.fromkeys(SPLITS, True)
    for piece in pieces:
        encoded = piece.text.encode()
        room = min(max(train_bytes - position, 0), len(encoded))
        while room < len(encoded) and encoded[room] & 0xC0 == 0x80:
            room -= 1
        position += len(encoded)
        for split, part in zip(SPLITS, (encoded[:room], encoded[room:]), strict=True):
            if part:
                ends = not piece.continues and (split == "validation" or room == len(encoded))
                yield SplitPiece(split, part.decode(), starts[split], ends, source)
                starts[split] = False
        if not piece.continues:
            starts = dict.fromkeys(SPLITS, True)
