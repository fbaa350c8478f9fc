"""From the tokens of the units to shards: each shard on its own, whatever process writes it."""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.building.process_pool import Advance
from data_pipeline.building.stages import UnitFacts, rows_file
from data_pipeline.building.token_rows import Chunk, RowFile
from data_pipeline.config import DataConfig
from data_pipeline.ingest.sources import Unit
from data_pipeline.ingest.splits import SPLITS, Split
from data_pipeline.storage.manifest import STREAMS
from data_pipeline.storage.shards import ShardWriter, WrittenShard, token_dtype
from data_pipeline.tokenize.tokenizer import Tokenizer

_MAX_OPEN_FILES = 256


class Row(NamedTuple):
    """A stretch of a document."""

    tokens: np.ndarray
    starts: bool


class UnitRows(NamedTuple):
    """The tokens of a unit on one side of the split."""

    unit: int
    chunks: tuple[int, ...]
    """Tokens of each."""


@dataclass(frozen=True)
class Stream:
    """The tokens of one source in one split, which become its shards."""

    work: Path
    source: str
    split: Split
    units: tuple[UnitRows, ...]
    bin_tokens: tuple[int, ...] | None
    """Shuffled: tokens in each of 2^n equal ranges of keys. None: in the order of the input."""

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return sum(sum(unit.chunks) for unit in self.units)

    def rows(self, begin: int) -> Iterator[Row]:
        """The rows from token `begin` on; the first may begin within one. Raises DataError for a damaged file."""
        rows = self._in_order(begin) if self.bin_tokens is None else self._shuffled(begin)
        return _without(rows)

    def _in_order(self, begin: int) -> Iterator[tuple[Row, int]]:
        for unit in self.units:
            if begin >= sum(unit.chunks):
                begin -= sum(unit.chunks)
                continue
            file = _open(rows_file(self.work, unit.unit, self.split))
            for number, size in enumerate(unit.chunks):
                if begin < size:
                    chunk = file.chunk(number)
                    for row in range(bisect_right(chunk.bounds, begin) - 1, len(chunk.starts)):
                        yield _row(chunk, row), max(begin - int(chunk.bounds[row]), 0)
                begin = max(begin - size, 0)

    def _shuffled(self, begin: int) -> Iterator[tuple[Row, int]]:
        assert self.bin_tokens is not None
        for number, size in enumerate(self.bin_tokens):
            if begin < size:
                for row in self._bin(number):
                    yield row, min(begin, len(row.tokens))
                    begin = max(begin - len(row.tokens), 0)
            begin = max(begin - size, 0)

    def _bin(self, number: int) -> Iterator[Row]:
        """The rows of a range of keys in the order of their keys; equal keys, which are rows of one document, in that
        of the input. Only keys and places are held in memory."""
        assert self.bin_tokens is not None
        edges = _edges(len(self.bin_tokens))[number : number + 2]
        keys, places = [], []
        for index, unit in enumerate(self.units):
            for chunk_number in range(len(unit.chunks)):
                chunk = self._chunk(index, chunk_number)
                low, high = _cuts(chunk.keys, edges)
                keys.append(chunk.keys[low:high])
                rows = np.arange(low, high)
                places.append(np.stack([np.full_like(rows, index), np.full_like(rows, chunk_number), rows], axis=1))
        for place in np.concatenate(places)[np.argsort(np.concatenate(keys), kind="stable")].tolist():
            yield _row(self._chunk(place[0], place[1]), place[2])

    def _chunk(self, index: int, number: int) -> Chunk:
        # Checked against its hash when the ranges were counted.
        return _chunk(rows_file(self.work, self.units[index].unit, self.split), number)


def _row(chunk: Chunk, row: int) -> Row:
    return Row(chunk.tokens[chunk.bounds[row] : chunk.bounds[row + 1]], bool(chunk.starts[row]))


def _without(rows: Iterator[tuple[Row, int]]) -> Iterator[Row]:
    """Rows without their first tokens, as many as it says."""
    for row, skipped in rows:
        if skipped < len(row.tokens):
            yield Row(row.tokens[skipped:], row.starts and not skipped)


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _open(path: Path) -> RowFile:
    return RowFile(path)


@functools.lru_cache(maxsize=4 * _MAX_OPEN_FILES)
def _chunk(path: Path, number: int) -> Chunk:
    return _open(path).chunk(number, check=False)


def forget_files() -> None:
    """Closes what this process holds open, so that it may go."""
    _chunk.cache_clear()
    _open.cache_clear()


def _edges(bins: int) -> list[int]:
    """Bounds of 2^n equal ranges of 64-bit keys."""
    return [2**64 // bins * number for number in range(bins + 1)]


def _cuts(keys: np.ndarray, edges: Sequence[int]) -> list[int]:
    """How many keys are below each edge; `keys` are sorted."""
    inner = np.searchsorted(keys, np.array([edge for edge in edges if edge < 2**64], np.uint64)).tolist()
    return inner + [len(keys)] * (len(edges) - len(inner))


def count_bins(work: Path, split: Split, units: Sequence[UnitRows], bin_tokens: int) -> tuple[int, ...]:
    """Tokens in each of so many equal ranges of keys that one holds about `bin_tokens`.

    Raises DataError for a damaged file."""
    total = sum(sum(unit.chunks) for unit in units)
    bins = 1 << max(0, -(-total // bin_tokens) - 1).bit_length()
    counts = np.zeros(bins, np.int64)
    for unit in units:
        file = _open(rows_file(work, unit.unit, split))
        for number in range(len(unit.chunks)):
            chunk = file.chunk(number)
            counts += np.diff(chunk.bounds.astype(np.int64)[_cuts(chunk.keys, _edges(bins))])
    return tuple(counts.tolist())


def plan_assembly(
    work: Path,
    sources: list[str],
    units: Sequence[Unit],
    facts: Sequence[UnitFacts],
    config: DataConfig,
    tokenizer: Tokenizer,
) -> "Assembly":
    """How the shards of all streams come from the units. Raises DataError for a damaged file of rows."""
    streams = []
    for split in SPLITS:
        for source in sources:
            rows = tuple(
                UnitRows(unit.number, tuple(done.streams[split].chunks))
                for unit, done in zip(units, facts, strict=True)
                if unit.source == source and done.streams[split].chunks
            )
            shuffled = config.shuffle and split == "train"
            bins = count_bins(work, split, rows, config.shard_tokens) if shuffled else None
            streams.append(Stream(work, source, split, rows, bins))
    dtype = token_dtype(config.stored_ids(tokenizer.vocab_size)).name
    metadata = {
        "format": str(STREAMS),
        "dtype": dtype,
        "eos_id": str(tokenizer.eos_id),
        "tokenizer_sha256": tokenizer.sha256,
    }
    return Assembly(work, tuple(streams), config.shard_tokens, dtype, metadata)


class ShardTask(NamedTuple):
    """A shard to write."""

    stream: int
    number: int
    """Of the shard in its split: what its name says."""
    begin: int
    """Its first token in its stream."""
    tokens: int


@dataclass(frozen=True)
class Assembly:
    """What all shards of a dataset share."""

    work: Path
    streams: tuple[Stream, ...]
    shard_tokens: int
    dtype: str
    metadata: dict[str, str]

    def tasks(self) -> list[ShardTask]:
        """All shards, in the order of the manifest."""
        numbers: dict[Split, Iterator[int]] = {}
        tasks = []
        for index, stream in enumerate(self.streams):
            for begin in range(0, stream.tokens, self.shard_tokens):
                number = next(numbers.setdefault(stream.split, itertools.count()))
                tasks.append(ShardTask(index, number, begin, min(self.shard_tokens, stream.tokens - begin)))
        return tasks


def write_shard(assembly: Assembly, task: ShardTask, advance: Advance) -> WrittenShard:
    """Writes a shard into the folder of the work. Raises DataError for damaged units, and when the disk refuses."""
    stream = assembly.streams[task.stream]
    writer = ShardWriter(
        assembly.work,
        stream.split[0],
        assembly.shard_tokens,
        np.dtype(assembly.dtype),
        assembly.metadata,
        task.number,
    )
    left = task.tokens
    try:
        for row in stream.rows(task.begin):
            tokens = row.tokens[:left]
            writer.append(tokens, row.starts)
            left -= len(tokens)
            advance(tokens.nbytes)
            if not left:
                break
        (shard,) = writer.finish()
    finally:
        writer.abort()
    assert not left, f"{stream.source} holds fewer tokens than its units say"
    return shard
