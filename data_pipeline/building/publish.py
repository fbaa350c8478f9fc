"""The last step of a build: what came out is written down; shards, tokenizer, manifest come to their places."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.building.build_state import BuildPlan
from data_pipeline.building.dataset_tokenizer import META, tokenizer_facts
from data_pipeline.building.shard_assembly import Assembly, ShardTask, Stream
from data_pipeline.building.stages import StreamFacts, UnitFacts, dropped_file
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, sync_folder
from data_pipeline.files.formats import kind
from data_pipeline.ingest.sources import CUT_RULE, Unit
from data_pipeline.ingest.splits import REASONS, SPLITS, Split, source_names
from data_pipeline.sampling import packing_plan
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import (
    MANIFEST,
    InputFile,
    Manifest,
    ShardFacts,
    SourceFacts,
    SplitFacts,
    fingerprint,
)
from data_pipeline.storage.shards import BATCH_TOKENS, WrittenShard
from data_pipeline.tokenize.tokenizer import TOKENIZER, Tokenizer, model_file


def describe(
    config: DataConfig,
    plan: BuildPlan,
    facts: list[UnitFacts],
    tokenizer: Tokenizer,
    assembly: Assembly,
    written: list[tuple[ShardTask, WrittenShard]],
) -> Manifest:
    """The manifest; the shards get the names that it says. Raises DataError if a split has no text."""
    shards = [_name(shard, assembly.streams[task.stream]) for task, shard in written]
    splits = {split: _split_facts(split, facts, shards) for split in SPLITS}
    for split, found in splits.items():
        if not found.documents:
            raise DataError(_why_empty(split, config, sum(done.documents for done in facts)))
    made_by = tokenizer_facts(tokenizer, config.tokenizer)
    rule = {**config.split.model_dump(include={"rule", "fraction"}), "seed": config.seed, "cut": CUT_RULE}
    if config.pairs:
        rule["pairs"] = True
    if config.chat:
        rule["chat_template"] = config.chat_template
    if config.labelled:
        rule["labels"] = config.labels.model_dump()
    return Manifest(
        fingerprint=fingerprint(made_by, assembly.dtype, rule, shards),
        identity=plan.identity,
        tokenizer=made_by,
        dtype=assembly.dtype,
        batch_tokens=min(BATCH_TOKENS, config.shard_tokens),
        shard_tokens=config.shard_tokens,
        sources=[
            _source_facts(
                name, files, [done for unit, done in zip(plan.units, facts, strict=True) if unit.source == name]
            )
            for name, files in zip(source_names(config), plan.inputs, strict=True)
        ],
        shards=shards,
        splits=splits,
        pairs=config.pairs,
        chat_template=config.chat_template if config.chat else None,
        labels=config.labels if config.labelled else None,
        **mixture(config),
    )


def _why_empty(split: Split, config: DataConfig, documents: int) -> str:
    """What is said of a split without a document, of so many in all."""
    rule, fraction = config.split.rule, config.split.fraction
    if rule == "given":
        source = "data.sources" if split == "train" else "data.split.files"
        return f"no text is in the {split} split: all documents of {source} are empty or left out"
    whole = rule == "tail" or config.chat or config.pairs or config.labelled
    few = "" if whole else "for few documents use data.split.rule=tail, else "
    return (
        f"no text fell into the {split} split (data.split.rule={rule}, fraction={fraction}, {documents} documents): "
        f"{few}take a {'smaller' if split == 'train' else 'larger'} data.split.fraction"
    )


def mixture(config: DataConfig) -> dict[str, Any]:
    """How often a run reads each source unless it says so itself: the keys of the manifest."""
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    if config.weights:
        weights = {name: config.weights.get(name, 0.0) for name in config.sources}
    repeats = {name: source.repeat for name, source in config.sources.items() if source.repeat is not None}
    return {"weights": weights if weights.keys() == config.sources.keys() else None, "repeats": repeats}


def _name(shard: WrittenShard, stream: Stream) -> ShardFacts:
    """Renames a shard after its content, so that no cache can take an old one for it."""
    named = shard.path.with_name(f"{shard.path.stem}-{shard.xxh3_128[:8]}.arrow")
    shard.path.rename(named)
    return ShardFacts(
        path=f"{stream.split}/{named.name}",
        split=stream.split,
        source=stream.source,
        tokens=shard.tokens,
        documents=shard.documents,
        batches=shard.batches,
        bytes=shard.bytes,
        xxh3_128=shard.xxh3_128,
    )


def _split_facts(split: Split, facts: list[UnitFacts], shards: list[ShardFacts]) -> SplitFacts:
    streams = [done.streams[split] for done in facts]
    byte_counts = np.sum([stream.byte_counts for stream in streams], axis=0)
    return SplitFacts(
        tokens=sum(shard.tokens for shard in shards if shard.split == split),
        documents=sum(stream.documents for stream in streams),
        bytes=sum(stream.bytes for stream in streams),
        unknown=sum(stream.unknown for stream in streams),
        byte_counts=byte_counts.tolist() if split == "validation" else None,
    )


def _source_facts(name: str, files: list[tuple[str, int, str]], facts: list[UnitFacts]) -> SourceFacts:
    dropped: Counter[str] = Counter()
    for done in facts:
        dropped.update(done.dropped)

    def total(what: Callable[[StreamFacts], int]) -> dict[Split, int]:
        return {split: sum(what(done.streams[split]) for done in facts) for split in SPLITS}

    return SourceFacts(
        name=name,
        inputs=[InputFile(path=path, bytes=size, xxh3=digest) for path, size, digest in files],
        documents=sum(done.documents for done in facts),
        bytes=sum(done.bytes for done in facts),
        tokens=total(lambda stream: stream.tokens),
        split_documents=total(lambda stream: stream.documents),
        split_bytes=total(lambda stream: stream.bytes),
        dropped={reason: dropped[reason] for reason in REASONS if dropped[reason]},
        replaced=sum(done.replaced for done in facts),
    )


def publish(root: Path, work: Path, manifest: Manifest) -> None:
    """Moves what is in `work` to its place; then what no manifest names any more goes."""
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
    remove_stale(root, manifest)


def remove_stale(root: Path, manifest: Manifest) -> None:
    """Removes shards, and plans of packed windows, that are not the manifest's, and manifests that a kill left half."""
    for file in root.glob(f".{MANIFEST}.*.tmp"):
        file.unlink()
    wanted = {shard.path for shard in manifest.shards}
    for file in itertools.chain.from_iterable((root / split).glob("*.arrow") for split in SPLITS):
        if str(file.relative_to(root)) not in wanted:
            file.unlink()
    packing_plan.remove_stale(Dataset(root, manifest))


def _replace_tokenizer(root: Path, work: Path) -> None:
    old, new = root / TOKENIZER, work / TOKENIZER
    if old.exists():
        if model_file(old).exists() and model_file(old).read_bytes() == model_file(new).read_bytes():
            (new / META).replace(old / META)
            return
        # Old manifest and new tokenizer must not be seen together.
        (root / MANIFEST).unlink(missing_ok=True)
        old.rename(work / f"old-{TOKENIZER}")
    new.rename(old)
    sync_folder(root)


def files_without_documents(units: list[Unit], facts: list[UnitFacts]) -> dict[str, list[str]]:
    """For each source its files of which nothing came into the dataset."""
    kept: dict[str, Counter[str]] = {}
    for unit, done in zip(units, facts, strict=True):
        counts = kept.setdefault(unit.source, Counter())
        for part, documents in zip(unit.slices, done.kept, strict=True):
            counts[part.name] += documents
    return {source: [name for name, count in counts.items() if not count] for source, counts in kept.items()}


def list_dropped(work: Path, units: list[Unit], facts: list[UnitFacts], file: Path) -> None:
    """Writes every document that was left out as a line of JSON: source, file, line or row, reason."""
    before: Counter[tuple[str, str]] = Counter()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "x", encoding="utf-8") as out:
                for unit, done in zip(units, facts, strict=True):
                    starts = []
                    for part, numbers in zip(unit.slices, done.numbers, strict=True):
                        starts.append(before[unit.source, part.name])
                        before[unit.source, part.name] += numbers
                    listed = dropped_file(work, unit)
                    for line in listed.read_text().splitlines() if listed.exists() else []:
                        index, number, reason = json.loads(line)
                        name = unit.slices[index].name
                        place: dict[str, Any] = {"source": unit.source, "file": name}
                        if kind(name) != "plain":
                            place["line" if kind(name) == "jsonl" else "row"] = starts[index] + number
                        out.write(json.dumps({**place, "reason": reason}, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())  # once the dataset is there, only building it anew would give the list again
            os.replace(temporary, file)
            sync_folder(file.parent)
        finally:
            temporary.unlink(missing_ok=True)
