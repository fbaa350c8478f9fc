"""What a worker process does with one unit: hash its files, look at its documents, sample its text, tokenize it."""

import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from data_pipeline.building.process_pool import Advance
from data_pipeline.building.token_rows import RowWriter
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, write_atomic
from data_pipeline.files.sealed import seal, unseal
from data_pipeline.ingest.duplicates import NearKeys
from data_pipeline.ingest.filters import Filter
from data_pipeline.ingest.sources import Unit, hash_file
from data_pipeline.ingest.splits import SPLITS, Split, SplitPiece, UnitReader, source_config
from data_pipeline.storage.shards import token_dtype
from data_pipeline.tokenize.chat_template import ChatTemplate
from data_pipeline.tokenize.label_tokens import LabelTokens
from data_pipeline.tokenize.tokenizer import Reservoir, Segment, Tokenizer

_GROUP_CHARACTERS = 2**20  # Text that is tokenized at once, for each thread: enough to keep it busy.
_PIECE_OVERHEAD = 64  # So that millions of tiny documents do not gather.


@dataclass(frozen=True)
class Context:
    """What all units of a build share."""

    config: DataConfig
    work: Path
    """The folder of the build."""
    verdicts: bool = False
    """Whether `look_at` decided which documents stay."""
    train_bytes: tuple[int, ...] = ()
    """Rule `tail`: how many bytes of each unit's text are for training."""
    tokenizer: Path | None = None
    """Its folder, once there is one."""
    threads: int = 1

    def reader(self, unit: Unit, advance: Advance) -> UnitReader:
        """The text of `unit` that stays."""
        verdicts = load_array(verdicts_file(self.work, unit), "verdicts") if self.verdicts else None
        train_bytes = self.train_bytes[unit.number] if self.train_bytes else 0
        return UnitReader(self.config, unit, advance, verdicts, train_bytes)


def hash_files(names: list[str], advance: Advance) -> list[tuple[str, int, str]]:
    """(path, bytes, xxh3_64) of each file."""
    return [(name, *hash_file(name, advance)) for name in names]


class Looked(NamedTuple):
    """What there is of the documents of a unit, an element each."""

    verdicts: np.ndarray
    """Index into REASONS, uint8."""
    bytes: np.ndarray
    """UTF-8 bytes of text, int64."""
    digests: np.ndarray
    """xxh3_128 of the text, uint64 [documents, 2]."""
    near: np.ndarray
    """Keys of NearKeys, uint64 [documents, bands]; none unless duplicates are sought so."""


def looked_file(work: Path, unit: Unit) -> Path:
    """Where the arrays of Looked are, once `look_at` has finished the unit."""
    return work / f"{unit.number:06d}.looked.npz"


def look_at(context: Context, unit: Unit, advance: Advance) -> None:
    """Reads every document once, before it is decided which stay. Raises DataError as the readers and filters do."""
    config = context.config
    near = NearKeys(config.duplicates) if config.duplicates.rule == "near" else None
    source = source_config(config, unit.source)
    document_filter = Filter(source.filter, f"data.sources.{unit.source}.filter", near is not None)
    reader = UnitReader(config, unit, advance)
    facts, keys = [], []
    for part, document in reader.documents():
        found = document_filter.facts(document, f"{part.name}, number {document.number}", reader.counts)
        facts.append((found.verdict, found.size, found.digest))
        if near is not None:
            keys.append(near.of(found.text) if not found.verdict else np.zeros(near.bands, np.uint64))
    bands = near.bands if near is not None else 0
    looked = Looked(
        np.array([verdict for verdict, _, _ in facts], np.uint8),
        np.array([size for _, size, _ in facts], np.int64),
        np.frombuffer(b"".join(digest for _, _, digest in facts), np.uint64).reshape(-1, 2),
        np.array(keys, np.uint64).reshape(len(facts), bands),
    )
    save_arrays(looked_file(context.work, unit), looked._asdict())


def verdicts_file(work: Path, unit: Unit) -> Path:
    """Where it says which documents of a unit stay: an index into REASONS for each."""
    return work / f"{unit.number:06d}.verdicts.npz"


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replaces an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with disk_errors(path):
        write_atomic(path, buffer.getvalue())


def load_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz file, which has checksums. Raises DataError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); remove the folder {path.parent}, and build again") from None


def sample_text(context: Context, limit: int, unit: Unit, advance: Advance) -> list[Segment]:
    """A sample of the unit's training text, of at most `limit` bytes."""
    pieces = context.reader(unit, advance).pieces()
    reservoir = Reservoir(limit, context.config.seed, unit.number)
    for piece in pieces:
        if piece.split == "train":
            reservoir.add_text(piece.text)
    return reservoir.segments()


class StreamFacts(BaseModel, frozen=True):
    """What a unit adds to one stream."""

    documents: int
    bytes: int
    unknown: int
    byte_counts: list[int]
    chunks: list[int]
    """Tokens of each chunk of its file of rows."""

    @property
    def tokens(self) -> int:
        """Tokens in all chunks."""
        return sum(self.chunks)


class UnitFacts(BaseModel, frozen=True):
    """The journal of a finished unit: written last, so that the unit is done when this exists."""

    tokenizer_sha256: str
    documents: int
    bytes: int
    dropped: dict[str, int]
    replaced: int
    numbers: list[int]
    """Lines or rows of each slice."""
    kept: list[int]
    """Documents of each slice that were not dropped."""
    streams: dict[Split, StreamFacts]

    @classmethod
    def load(cls, work: Path, unit: Unit, tokenizer_sha256: str) -> "UnitFacts | None":
        """The journal, if the unit was finished with this tokenizer; a damaged one counts for nothing."""
        try:
            facts = cls.model_validate(unseal(_journal(work, unit).read_bytes()))
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"warning: {_journal(work, unit)} is damaged ({error}): the unit is done again", file=sys.stderr)
            return None
        return facts if facts.tokenizer_sha256 == tokenizer_sha256 else None


def _journal(work: Path, unit: Unit) -> Path:
    return work / f"{unit.number:06d}.json"


def rows_file(work: Path, unit_number: int, split: Split) -> Path:
    """Where the tokens of a unit are."""
    return work / f"{unit_number:06d}.{split}.rows"


def dropped_file(work: Path, unit: Unit) -> Path:
    """Where it says which documents a unit left out, a JSON list [slice, number, reason] a line; there
    is none if there are none."""
    return work / f"{unit.number:06d}.dropped"


class _Stream:
    """One side of the split of a unit."""

    def __init__(self, writer: RowWriter) -> None:
        self.writer = writer
        self.documents = self.bytes = self.unknown = 0
        self.byte_counts = np.zeros(256, np.int64)

    def add(
        self,
        piece: SplitPiece,
        ids: np.ndarray,
        offsets: np.ndarray | None,
        unk_id: int,
        eos: np.ndarray,
        frame: ChatTemplate | LabelTokens | None,
    ) -> None:
        self.documents += piece.starts
        self.bytes += len(piece.data)
        self.unknown += int(np.count_nonzero(ids == unk_id))
        if piece.split == "validation":
            self.byte_counts += np.bincount(np.frombuffer(piece.data, np.uint8), minlength=256)
        if isinstance(frame, ChatTemplate):
            ids = frame.framed(ids, piece.turn, piece.ends)
        elif frame is not None:
            ids = frame.framed(ids, piece.labelled, offsets)
        self.writer.append(ids, piece.starts, piece.key)
        if piece.ends and frame is None:
            self.writer.append(eos, False, piece.key)

    def facts(self) -> StreamFacts:
        return StreamFacts(
            documents=self.documents,
            bytes=self.bytes,
            unknown=self.unknown,
            byte_counts=self.byte_counts.tolist(),
            chunks=self.writer.chunks,
        )


def tokenize(context: Context, unit: Unit, advance: Advance) -> UnitFacts:
    """Writes the unit's tokens and its journal. Raises DataError as the readers do, and when the disk refuses."""
    assert context.tokenizer is not None
    tokenizer = Tokenizer.of(context.tokenizer)
    frame = _frame(context.config, tokenizer)
    dtype, eos = token_dtype(context.config.stored_ids(tokenizer.vocab_size)), np.array([tokenizer.eos_id])
    reader = context.reader(unit, advance)
    streams = {
        split: _Stream(
            RowWriter(rows_file(context.work, unit.number, split), dtype, context.config.shuffle and split == "train")
        )
        for split in SPLITS
    }
    try:
        for group in _groups(reader.pieces(), _GROUP_CHARACTERS * context.threads):
            encoded = _encoded([piece.text for piece in group], tokenizer, frame, context.threads)
            for piece, (ids, offsets) in zip(group, encoded, strict=True):
                streams[piece.split].add(piece, ids, offsets, tokenizer.unk_id, eos, frame)
        for stream in streams.values():
            stream.writer.finish()
    finally:
        for stream in streams.values():
            stream.writer.abort()
    facts = UnitFacts(
        tokenizer_sha256=tokenizer.sha256,
        documents=reader.counts.documents,
        bytes=reader.counts.bytes,
        dropped=dict(reader.counts.dropped),
        replaced=reader.counts.replaced,
        numbers=reader.numbers,
        kept=reader.kept,
        streams={split: stream.facts() for split, stream in streams.items()},
    )
    with disk_errors(context.work):
        if reader.dropped:
            lines = "".join(json.dumps(item) + "\n" for item in reader.dropped)
            write_atomic(dropped_file(context.work, unit), lines)
        write_atomic(_journal(context.work, unit), seal(facts.model_dump_json(indent=1)))
    return facts


def _frame(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate | LabelTokens | None:
    """What writes more than a text with its end-of-text."""
    if config.labelled:
        return LabelTokens(config.labels, tokenizer)
    return ChatTemplate(config.chat_template, tokenizer) if config.chat else None


def _encoded(
    texts: list[str], tokenizer: Tokenizer, frame: ChatTemplate | LabelTokens | None, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Ids of each text; with offsets where labels are of tokens, or there would be two passes over it."""
    if isinstance(frame, LabelTokens) and frame.by_token:
        return map(tokenizer.encode_with_offsets, texts)
    return ((ids, None) for ids in tokenizer.encode(texts, threads))


def _groups(pieces: Iterator[SplitPiece], characters: int) -> Iterator[list[SplitPiece]]:
    group: list[SplitPiece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text) + _PIECE_OVERHEAD
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group
