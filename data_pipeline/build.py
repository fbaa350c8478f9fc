"""Text to dataset: train the tokenizer, tokenize, write shards aside, publish with the manifest last."""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.atomic import disk_errors, sync_folder, write_atomic, write_json
from data_pipeline.config import DataConfig
from data_pipeline.corpus import SPLITS, Corpus, Progress, Split, SplitPiece
from data_pipeline.dataset import MODEL, TOKENIZER, Dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import (
    FORMAT,
    MANIFEST,
    InputFile,
    Manifest,
    ShardFacts,
    SourceFacts,
    SplitFacts,
    TokenizerFacts,
    differences,
    fingerprint,
)
from data_pipeline.readers import ReadCounts
from data_pipeline.shards import BATCH_TOKENS, ShardWriter, WrittenShard, token_dtype
from data_pipeline.sources import CUT_RULE, kind
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

META = "meta.json"
_WORK = ".building"
_LOCK = ".lock"
_GROUP_CHARACTERS = 8 * 2**20  # Text that is tokenized at once: enough to keep the threads busy.
_PIECE_OVERHEAD = 64  # So that millions of tiny documents do not gather.
_MAX_THREADS = 16

Inputs = list[list[tuple[str, int, str]]]


def build(config: DataConfig, progress: Progress | None = None, overwrite: bool = False) -> Manifest:
    """Builds the dataset of `config` at `config.path`, or returns what stands there if it is that very dataset.

    Stages told to `progress`: hash, measure (tail split), tokenizer, tokenize; `unchanged` if there was nothing to do.
    Interrupted anywhere, it leaves the former state; run again, it gives the same bytes. (Only while `overwrite`
    exchanges a tokenizer, between two renames, is there no dataset.)

    Raises DataError for unusable text or settings, a full disk, and, unless `overwrite`, for another dataset there.
    """
    corpus = Corpus(config, progress)
    root = Path(config.path)
    inputs = corpus.inputs()
    identity = _identity(config, corpus, inputs)
    with _working_folder(root) as work:
        if (root / MANIFEST).exists() and not overwrite:
            if changed := differences(Manifest.load(root).identity, identity):
                raise DataError(
                    f"another dataset is at {root}: {'; '.join(changed)}. Choose another data.path, or --overwrite it"
                )
            corpus.report("unchanged", corpus.input_bytes)
            manifest = Dataset.open(root).manifest
            _remove_stale(root, manifest)
            return manifest
        # A dataset that stands there needs its tokenizer until the new one is complete.
        home = work if overwrite else root
        tokenizer = _prepare_tokenizer(home, work, corpus, inputs)
        manifest = _write(config, corpus, inputs, identity, tokenizer, work)
        _publish(root, work, manifest)
    return manifest


def build_tokenizer(config: DataConfig, progress: Progress | None = None, overwrite: bool = False) -> Tokenizer:
    """Trains the tokenizer of `config` at `config.path`, or returns it if it stands there.

    Raises DataError for unusable text or settings, and for another tokenizer there: unless `overwrite`, and always if
    a dataset depends on it.
    """
    corpus = Corpus(config, progress)
    root = Path(config.path)
    inputs = corpus.inputs()
    with _working_folder(root) as work:
        if overwrite and (root / TOKENIZER).exists():
            if (root / MANIFEST).exists():
                raise DataError(f"the dataset at {root} depends on its tokenizer: `duet data build --overwrite` it")
            shutil.rmtree(root / TOKENIZER)
        return _prepare_tokenizer(root, work, corpus, inputs)


def _identity(config: DataConfig, corpus: Corpus, inputs: Inputs) -> dict[str, Any]:
    """What the dataset is made from. Content only: moving the files or the dataset changes nothing."""
    return {
        "tokenizer": config.tokenizer.model_dump(),
        "split": config.split.model_dump(exclude={"files"}),
        "errors": config.errors,
        "seed": config.seed,
        "cut": CUT_RULE,
        "shard_tokens": config.shard_tokens,
        "sources": {
            source.name: {
                "text_key": source.text_key,
                "inputs (xxh3)": [f"{kind(Path(path))} {digest}" for path, _, digest in files],
            }
            for source, files in zip(corpus.sources, inputs, strict=True)
        },
    }


@contextmanager
def _working_folder(root: Path) -> Iterator[Path]:
    """An empty folder inside `root`, removed at the end; leftovers of a killed build are removed first."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / _LOCK, "w")  # noqa: SIM115 - held until the end
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build is at work in {root}; wait for it, or choose another data.path") from None
        work = root / _WORK
        if work.exists():
            shutil.rmtree(work)
        try:
            with disk_errors(work):
                work.mkdir()
            yield work
        finally:
            shutil.rmtree(work)


def _prepare_tokenizer(home: Path, work: Path, corpus: Corpus, inputs: Inputs) -> Tokenizer:
    """The tokenizer in `home`, trained there unless it is there. Raises DataError if another one is."""
    identity = _identity(corpus.config, corpus, inputs)
    del identity["shard_tokens"]
    folder = home / TOKENIZER
    if folder.exists():
        return _load_tokenizer(folder, identity)
    texts = (piece.text for piece in corpus.pieces("tokenizer", {}) if piece.split == "train")
    tokenizer_config = corpus.config.tokenizer
    model = train_tokenizer(texts, tokenizer_config, corpus.config.seed)
    tokenizer = Tokenizer(model)
    facts = _tokenizer_facts(tokenizer, tokenizer_config.type).model_dump()
    meta = {"format": FORMAT, **facts, "identity": identity}
    new = work / "new-tokenizer"
    with disk_errors(folder):
        new.mkdir()
        write_atomic(new / MODEL, model)
        write_json(new / META, meta)
        new.rename(folder)
        sync_folder(home)
    return tokenizer


def _load_tokenizer(folder: Path, identity: dict[str, Any]) -> Tokenizer:
    ways_on = "choose another data.path, or --overwrite it"
    try:
        meta = json.loads((folder / META).read_bytes())
        trained_for, sha256 = meta["identity"], meta["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no usable {META} that says what it was trained on ({error!r}); {ways_on}"
        ) from None
    if changed := differences(trained_for, identity):
        raise DataError(f"{folder} was trained for other data: {'; '.join(changed)}. {ways_on.capitalize()}")
    tokenizer = Tokenizer.load(folder / MODEL)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{folder / MODEL} is not the model that {META} beside it describes; {ways_on}")
    return tokenizer


def _tokenizer_facts(tokenizer: Tokenizer, model_type: str) -> TokenizerFacts:
    return TokenizerFacts(
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        type=model_type,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
    )


@dataclass
class _Output:
    """The stream of one source in one split, and what went into it."""

    writer: ShardWriter
    documents: int = 0
    bytes: int = 0
    unknown: int = 0
    byte_counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, piece: SplitPiece, ids: np.ndarray, eos: np.ndarray, unk_id: int) -> None:
        encoded = np.frombuffer(piece.text.encode(), np.uint8)
        self.documents += piece.starts
        self.bytes += len(encoded)
        self.unknown += int(np.count_nonzero(ids == unk_id))
        if piece.split == "validation":
            self.byte_counts += np.bincount(encoded, minlength=256)
        self.writer.append(ids, piece.starts)
        if piece.ends:
            self.writer.append(eos, False)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.writer.shards)


def _split_facts(split: Split, outputs: Iterable[_Output]) -> SplitFacts:
    outputs = list(outputs)
    byte_counts = np.sum([output.byte_counts for output in outputs], axis=0)
    return SplitFacts(
        tokens=sum(output.tokens for output in outputs),
        documents=sum(output.documents for output in outputs),
        bytes=sum(output.bytes for output in outputs),
        unknown=sum(output.unknown for output in outputs),
        byte_counts=byte_counts.tolist() if split == "validation" else None,
    )


def _write(
    config: DataConfig, corpus: Corpus, inputs: Inputs, identity: dict[str, Any], tokenizer: Tokenizer, work: Path
) -> Manifest:
    """Writes all shards into `work`, under the names they will have, and returns the manifest."""
    dtype = token_dtype(tokenizer.vocab_size)
    facts = _tokenizer_facts(tokenizer, config.tokenizer.type)
    metadata = {
        "format": str(FORMAT),
        "dtype": dtype.name,
        "eos_id": str(tokenizer.eos_id),
        "tokenizer_sha256": tokenizer.sha256,
    }
    outputs: dict[Split, dict[str, _Output]] = {split: {} for split in SPLITS}

    def begin(source: str) -> None:
        """Streams of the sources before are complete."""
        for split in SPLITS:
            for output in outputs[split].values():
                output.writer.finish()
            first = sum(len(output.writer.shards) for output in outputs[split].values())
            writer = ShardWriter(work, split[0], config.shard_tokens, dtype, metadata, first)
            outputs[split][source] = _Output(writer)

    counts: dict[str, ReadCounts] = {}
    try:
        _tokenize(corpus, counts, tokenizer, outputs, begin)
        for split in SPLITS:
            for output in outputs[split].values():
                output.writer.finish()
    finally:
        for split in SPLITS:
            for output in outputs[split].values():
                output.writer.abort()
    for split in SPLITS:
        if not any(output.documents for output in outputs[split].values()):
            raise DataError(
                f"no text fell into the {split} split (data.split.rule={config.split.rule}, "
                f"fraction={config.split.fraction}, {sum(tally.documents for tally in counts.values())} documents): "
                "for few documents use data.split.rule=tail, else another fraction"
            )
    shards = [
        _name(shard, split, name, work)
        for split in SPLITS
        for name, output in outputs[split].items()
        for shard in output.writer.shards
    ]
    rule = {**config.split.model_dump(include={"rule", "fraction"}), "seed": config.seed, "cut": CUT_RULE}
    return Manifest(
        fingerprint=fingerprint(facts, dtype.name, rule, shards),
        identity=identity,
        tokenizer=facts,
        dtype=dtype.name,
        batch_tokens=min(BATCH_TOKENS, config.shard_tokens),
        shard_tokens=config.shard_tokens,
        sources=[
            SourceFacts(
                name=name,
                inputs=[InputFile(path=path, bytes=size, xxh3=digest) for path, size, digest in files],
                documents=tally.documents,
                bytes=tally.bytes,
                tokens={split: outputs[split][name].tokens for split in SPLITS},
                split_documents={split: outputs[split][name].documents for split in SPLITS},
                split_bytes={split: outputs[split][name].bytes for split in SPLITS},
                dropped=dict(tally.dropped),
                replaced=tally.replaced,
            )
            for (name, tally), files in zip(counts.items(), inputs, strict=True)
        ],
        shards=shards,
        splits={split: _split_facts(split, outputs[split].values()) for split in SPLITS},
    )


def _tokenize(
    corpus: Corpus,
    counts: dict[str, ReadCounts],
    tokenizer: Tokenizer,
    outputs: dict[Split, dict[str, _Output]],
    begin: Callable[[str], None],
) -> None:
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    eos = np.array([tokenizer.eos_id])
    pending = [source.name for source in corpus.sources]
    for group in _groups(corpus.pieces("tokenize", counts)):
        encoded = tokenizer.encode([piece.text for piece in group], threads)
        for piece, ids in zip(group, encoded, strict=True):
            while piece.source not in outputs["train"]:
                begin(pending.pop(0))
            outputs[piece.split][piece.source].add(piece, ids, eos, tokenizer.unk_id)
    for source in pending:
        begin(source)


def _groups(pieces: Iterator[SplitPiece]) -> Iterator[list[SplitPiece]]:
    group: list[SplitPiece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text) + _PIECE_OVERHEAD
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _name(shard: WrittenShard, split: Split, source: str, work: Path) -> ShardFacts:
    """Renames a shard after its content, so that no cache can take an old one for it."""
    named = shard.path.with_name(f"{shard.path.stem}-{shard.xxh3_128[:8]}.arrow")
    shard.path.rename(named)
    return ShardFacts(
        path=f"{split}/{named.name}",
        split=split,
        source=source,
        tokens=shard.tokens,
        documents=shard.documents,
        batches=shard.batches,
        bytes=shard.bytes,
        xxh3_128=shard.xxh3_128,
    )


def _publish(root: Path, work: Path, manifest: Manifest) -> None:
    """Shards, tokenizer, manifest, in this order; then what no manifest names any more goes."""
    with disk_errors(root):
        for split in SPLITS:
            (root / split).mkdir(exist_ok=True)
        for shard in manifest.shards:
            (work / Path(shard.path).name).replace(root / shard.path)
        for split in SPLITS:
            sync_folder(root / split)
        if (work / TOKENIZER).exists():
            _replace_tokenizer(root, work)
        manifest.save(root)
    _remove_stale(root, manifest)


def _remove_stale(root: Path, manifest: Manifest) -> None:
    wanted = {shard.path for shard in manifest.shards}
    for file in itertools.chain.from_iterable((root / split).glob("*.arrow") for split in SPLITS):
        if str(file.relative_to(root)) not in wanted:
            file.unlink()


def _replace_tokenizer(root: Path, work: Path) -> None:
    old, new = root / TOKENIZER, work / TOKENIZER
    if old.exists():
        if (old / MODEL).exists() and (old / MODEL).read_bytes() == (new / MODEL).read_bytes():
            (new / META).replace(old / META)
            return
        # Old manifest and new tokenizer must not be seen together.
        (root / MANIFEST).unlink(missing_ok=True)
        old.rename(work / "old-tokenizer")
    new.rename(old)
    sync_folder(root)
