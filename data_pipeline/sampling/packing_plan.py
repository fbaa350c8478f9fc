"""Plans of packed windows: Arrow files beside the shards, each of one stream, one context and one rule.

A plan follows from the stream and the context alone, so it is computed once, by whoever comes first, and again when it
is damaged. A row is a window: where in the stream its slices begin, and how long they are. Record batches carry their
hash, and a head: their share of the totals, with a hash that says of which plan they are which part.
"""

import fcntl
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, open_lock, sync_folder
from data_pipeline.files.mapped import remember
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.best_fit import Packed, pack
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.shards import arrow, check_inside
from data_pipeline.storage.token_stream import TokenStream

FOLDER = "packing"
FORMAT = "2"
"""Plans of the first format have no heads."""
RULE, TURNS_RULE = "best_fit_1", "best_fit_turns_1"
"""Names what `_stretches` and `pack` do, and `whole_turns` with conversations: raised when windows would come out
otherwise."""
_STRETCH_SLICES, _STRETCH_TOKENS = 2**22, 2**31
_BATCH_WINDOWS = 2**16
_SCHEMA = pa.schema(
    [
        pa.field(
            "slices",
            pa.list_(pa.struct([pa.field("start", pa.int64(), False), pa.field("tokens", pa.int32(), False)])),
            nullable=False,
        )
    ]
)


@dataclass(frozen=True)
class PackingFacts:
    """What packing came to."""

    windows: int = 0
    inputs: int = 0
    """Places of the windows' inputs that hold a token."""
    documents: int = 0
    cut: int = 0
    """Documents that are longer than a window, and so in several; conversations go on to their last whole turn."""
    left_out: int = 0
    """Conversations without a whole turn of the assistant in a window."""


class PackingPlan:
    """A finished plan, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if there is none, or its header or footer is damaged."""
        self.path = path
        try:
            self.metadata = {key.decode(): value.decode() for key, value in self._reader.schema.metadata.items()}
            self.context = int(self.metadata["context"])
            shares = [self._share(batch) for batch in range(self._reader.num_record_batches)]
            if "format" in self.metadata and [share["last"] for share in shares] != ["0"] * (len(shares) - 1) + ["1"]:
                raise ValueError("its last batches are missing")
            self._first_window = np.cumsum([0, *(int(share["windows"]) for share in shares)])
            names = PackingFacts.__dataclass_fields__
            totals = {key: sum(int(share.get(key, 0)) for share in shares) for key in names}
        except FileNotFoundError:
            raise DataError(f"packing plan {path} is missing") from None
        except (pa.ArrowException, OSError, ValueError, LookupError, AttributeError) as error:
            raise self._damaged(f"damaged header or footer ({error})") from None
        totals["cut"] -= totals["left_out"]  # a share counts all that are longer than a window
        self.facts = PackingFacts(**totals)
        self._views: dict[int, Packed] = {}

    @classmethod
    def of_stream(cls, root: Path, fingerprint: str, context: int, rule: str = RULE) -> "PackingPlan":
        """The plan of a stream of the dataset at `root`. Raises DataError if there is none, or it is another's."""
        path = plan_path(root, fingerprint, context, rule)
        if not path.exists():
            raise DataError(
                f"{root} is not packed for model.context={context}: `duet data plan` with data.packing=best_fit and "
                "this context does it"
            )
        plan = cls(path)
        wanted = _metadata(fingerprint, context, rule)
        if plan.metadata not in (wanted, {key: value for key, value in wanted.items() if key != "format"}):
            raise plan._damaged(f"it is the plan of something else ({plan.metadata})")
        return plan

    def __len__(self) -> int:
        """Number of windows."""
        return self.facts.windows

    @property
    def padding(self) -> float:
        """Share of the windows' inputs that hold no token."""
        return 1 - self.facts.inputs / (self.facts.windows * self.context)

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Record batch of the plan, and row in it, of each window, int64 [n]."""
        batches = self._first_window.searchsorted(indices, "right") - 1
        return batches, indices - self._first_window[batches]

    def batch(self, number: int) -> Packed:
        """The windows of a record batch: views. Raises DataError if it does not match its hash."""
        view = self._views.get(number)
        if view is None:
            try:
                record, share = self._record(number)
                check_inside(record, self._mapped)
                column = record.column(0)
                _, bounds, _, _, starts, _, lengths = column.buffers()
                view = Packed(
                    np.frombuffer(bounds, np.int32, record.num_rows + 1),
                    np.frombuffer(starts, np.int64, len(column.values)),
                    np.frombuffer(lengths, np.int32, len(column.values)),
                )
            except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                raise self._damaged(f"batch {number} cannot be read ({error})") from None
            if share["xxh3"] != _hash(view):
                raise self._damaged(f"batch {number} does not match its hash")
            self._views[number] = view
        return view

    def check(self) -> None:
        """Compares every batch with its hash. Raises DataError that names the first damaged one."""
        for number in range(len(self._first_window) - 1):
            self.batch(number)

    @cached_property
    def _mapped(self) -> pa.Buffer:
        mapped = pa.memory_map(str(self.path)).read_buffer()
        remember(self, self.path, mapped.size)
        return mapped

    @cached_property
    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        return pa.ipc.open_file(self._mapped)

    def _record(self, batch: int) -> tuple[pa.RecordBatch, dict[str, str]]:
        record, share = self._reader.get_batch_with_custom_metadata(batch)
        return record, {key.decode(): value.decode() for key, value in share.items()}

    def _share(self, batch: int) -> dict[str, str]:
        """What a record batch says of itself. Raises ValueError if it was altered."""
        record, share = self._record(batch)
        if int(share["windows"]) != record.num_rows or ("format" in self.metadata) != ("head" in share):
            raise ValueError(f"batch {batch} does not hold what it says")
        if "head" in share and share.pop("head") != _head(self.metadata, batch, share):
            raise ValueError(f"the head of batch {batch} does not match its hash")
        return share

    def _damaged(self, what: str) -> DataError:
        return DataError(f"packing plan {self.path}: {what}; remove the file, and it is computed again")

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps stay behind."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_mapped", "_reader")} | {"_views": {}}


class _Part(NamedTuple):
    """A record batch to write, and its share of the totals."""

    view: Packed
    share: dict[str, int]


class _Missing(NamedTuple):
    stream: TokenStream
    fingerprint: str


def rule_of(dataset: Dataset) -> str:
    """The name of the rule by which a dataset is packed."""
    return RULE if dataset.manifest.chat_template is None else TURNS_RULE


def plan_path(root: Path, fingerprint: str, context: int | Literal["*"], rule: str = RULE) -> Path:
    """Where the plan of a stream is, named by all that it depends on."""
    return root / FOLDER / f"{fingerprint[:16]}-{context}-{rule}.arrow"


def prepare(dataset: Dataset, context: int, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Computes the plans that a run of `context` needs and that are not there: of each source, and of validation.

    One process computes, others wait for it. `progress` gets ("pack", bytes done, bytes in all).

    Raises DataError for a damaged shard, when the disk refuses, and for a dataset at a URI.
    """
    _check_local(dataset)
    missing = [
        _Missing(TokenStream(dataset, split, source), fingerprint)
        for split, source, fingerprint in _streams(dataset)
        if not _is_whole(dataset, fingerprint, context)
    ]
    if not missing:
        return
    size, rule = 2 if dataset.manifest.dtype == "uint16" else 4, rule_of(dataset)
    total, before = size * sum(stream.num_tokens for stream, _ in missing), 0
    folder = dataset.path / FOLDER
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = open_lock(folder / ".lock")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stream, fingerprint in missing:
            if not _is_whole(dataset, fingerprint, context):  # it may have come while we waited
                path = plan_path(dataset.path, fingerprint, context, rule)
                marks = dataset.manifest.tokenizer.vocab_size if rule == TURNS_RULE else None
                for done in _write(path, stream, _metadata(fingerprint, context, rule), context, marks):
                    if progress is not None:
                        progress("pack", before + size * done, total)
            before += size * stream.num_tokens


def _is_whole(dataset: Dataset, fingerprint: str, context: int) -> bool:
    """Whether a plan is there, and matches its hashes; says so if it does not."""
    if not plan_path(dataset.path, fingerprint, context, rule_of(dataset)).exists():
        return False
    try:
        PackingPlan.of_stream(dataset.path, fingerprint, context, rule_of(dataset)).check()
    except DataError as error:
        print(f"warning: {error}", file=sys.stderr)
        return False
    return True


def prepared(dataset: Dataset, context: int) -> bool:
    """Whether `prepare` has nothing to do. Raises DataError for a dataset at a URI."""
    _check_local(dataset)
    rule = rule_of(dataset)
    return all(plan_path(dataset.path, stream, context, rule).exists() for _, _, stream in _streams(dataset))


def plans(dataset: Dataset) -> Iterator[tuple[str, PackingPlan]]:
    """What is packed of a dataset, whatever the context: source or `validation`, and plan.

    Raises DataError for one whose header or footer is damaged.
    """
    yield from ((name, PackingPlan(path)) for name, path in _files(dataset))


def remove_stale(dataset: Dataset) -> None:
    """Removes plans of streams, or by rules, that are no more."""
    wanted = {path for _, path in _files(dataset)}
    for file in (dataset.path / FOLDER).glob("*.arrow"):
        if file not in wanted:
            file.unlink()


def _check_local(dataset: Dataset) -> None:
    if dataset.is_remote:
        raise DataError(
            f"data.packing=best_fit takes a dataset on a file system, where its plan can lie beside it, and "
            f"{dataset.name} is at a URI; copy it, or set data.packing=plain"
        )


def _files(dataset: Dataset) -> Iterator[tuple[str, Path]]:
    for split, source, fingerprint in _streams(dataset):
        for path in sorted(
            (dataset.path / FOLDER).glob(plan_path(dataset.path, fingerprint, "*", rule_of(dataset)).name)
        ):
            yield source or split, path


def _streams(dataset: Dataset) -> Iterator[tuple[Split, str | None, str]]:
    """Split, source and fingerprint of what is packed for itself."""
    for source in dataset.sources():
        yield "train", source, dataset.stream_fingerprint(source)
    if dataset.shards_of("validation"):
        yield "validation", None, dataset.stream_fingerprint(None, "validation")


def _metadata(fingerprint: str, context: int, rule: str) -> dict[str, str]:
    return {"fingerprint": fingerprint, "context": str(context), "rule": rule, "format": FORMAT}


def _stretches(stream: TokenStream, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where documents begin, and their tokens, int64 [n] each: in stretches of the stream that are packed for
    themselves, so that memory is bounded, and windows that follow each other lie in few shards.

    A stretch ends with the last document that ends in the record batch with which it has so many slices or tokens.
    """
    held: list[np.ndarray] = []
    begin = end = documents = 0
    for batch in range(stream.num_batches):
        held.append(stream.bounds(batch) + np.int64(end))
        end += len(stream.mapped()[batch])
        documents += len(held[-1])
        if documents + (end - begin) // context >= _STRETCH_SLICES or end - begin >= _STRETCH_TOKENS:
            starts = np.concatenate(held)
            if len(starts) > 1:
                yield starts[:-1], np.diff(starts)
            held, begin, documents = [starts[-1:]], int(starts[-1]), 1
    starts = np.concatenate(held)
    yield starts, np.diff(starts, append=end)


def _write(path: Path, stream: TokenStream, metadata: dict[str, str], context: int, marks: int | None) -> Iterator[int]:
    """Writes a plan, whole or not at all; yields tokens that are done. Under the lock: the temporary name is fixed.

    `marks`: of conversations, from which id on a stored token is marked."""
    temporary, schema, done = path.with_name(f".{path.name}.tmp"), _SCHEMA.with_metadata(metadata), 0
    temporary.unlink(missing_ok=True)
    held: _Part | None = None
    number = itertools.count()
    try:
        with disk_errors(path), open(temporary, "xb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for starts, lengths in _stretches(stream, context):
                    kept = lengths if marks is None else whole_turns(stream, starts, lengths, context + 1, marks)
                    for part in _parts(starts, lengths, kept, context):
                        if held is not None:
                            _add(writer, schema, held, next(number), last=False)
                        held = part
                    done += int(lengths.sum())
                    yield done
                if held is None:
                    raise DataError(
                        f"{stream.name}: no conversation has a turn of the assistant within {context + 1} tokens: "
                        "raise model.context"
                    )
                _add(writer, schema, held, next(number), last=True)
            file.flush()
            os.fsync(file.fileno())
        with disk_errors(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _parts(starts: np.ndarray, lengths: np.ndarray, kept: np.ndarray, context: int) -> Iterator[_Part]:
    """A stretch, packed, as record batches of windows; of `lengths`, int64 [n], so much is `kept`."""
    some = kept > 0
    packed, share = pack(starts[some], kept[some], context), {"documents": len(starts)}
    share["cut"] = int((lengths > context + 1).sum())
    if not some.all():
        share["left_out"] = int((~some).sum())
    for first in range(0, len(packed.bounds) - 1, _BATCH_WINDOWS):
        bounds = packed.bounds[first : first + _BATCH_WINDOWS + 1]
        inside = slice(bounds[0], bounds[-1])
        view = Packed((bounds - bounds[0]).astype(np.int32), packed.starts[inside], packed.lengths[inside])
        tokens = np.add.reduceat(view.lengths, view.bounds[:-1])
        yield _Part(view, share | {"windows": len(tokens), "inputs": int(np.minimum(tokens, context).sum())})
        share = {"documents": 0, "cut": 0}


def whole_turns(stream: TokenStream, starts: np.ndarray, lengths: np.ndarray, width: int, marks: int) -> np.ndarray:
    """How many tokens of each document are packed, int64 [n]: of a conversation longer than `width` as many as end with
    its last turn of the assistant's that fits, or none; all of others, which begin with a marked token.

    `marks`: from which id on a stored token is marked.
    """
    kept = lengths.copy()
    for which in np.flatnonzero(lengths > width).tolist():
        batch, offset = (int(place[0]) for place in stream.places(starts[which : which + 1]))
        head = np.empty(width + 1, np.int64)
        stream.join(batch, offset, head)
        written = head >= marks
        if not written[0]:
            ends = np.flatnonzero(written[:-1] & ~written[1:])
            kept[which] = ends[-1] + 1 if len(ends) else 0
    return kept


def _add(writer: Any, schema: pa.Schema, part: _Part, number: int, last: bool) -> None:
    values = pa.StructArray.from_arrays(
        [arrow(part.view.starts), arrow(part.view.lengths)], fields=list(schema.field(0).type.value_type)
    )
    column = pa.ListArray.from_arrays(arrow(part.view.bounds), values, type=schema.field(0).type)
    record = pa.record_batch([column], schema=schema)
    custom = {key: str(value) for key, value in part.share.items()}
    custom |= {"xxh3": _hash(part.view), "last": str(int(last))}
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    writer.write_batch(record, custom_metadata=custom | {"head": _head(metadata, number, custom)})


def _head(metadata: dict[str, str], number: int, share: dict[str, str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps([metadata, number, share], sort_keys=True).encode())


def _hash(view: Packed) -> str:
    digest = xxhash.xxh3_64()
    for array in view:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
