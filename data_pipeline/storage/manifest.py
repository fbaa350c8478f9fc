"""What a finished dataset is: published last, so that a dataset exists only when its manifest does."""

import hashlib
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import BaseModel

from data_pipeline.config import LabelsConfig
from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, write_atomic
from data_pipeline.files.filesystem import is_uri, join, open_raw
from data_pipeline.files.sealed import seal, unseal
from data_pipeline.ingest.splits import GIVEN, Split
from data_pipeline.places import DATASET, mistaken

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
WORK = "_work"
"""What a build has finished, until the manifest is written."""
FORMAT: Final = 4
"""Of manifests that carry a hash of their own, and the weights of the sources."""
STREAMS: Final = 2
"""Of the shards, and what a fingerprint is made of: a source is a stream of its own."""
PAIRS: Final = 3
"""Of the pairs of former versions; else as format 2, which was that of text."""
READABLE = (1, STREAMS, PAIRS, FORMAT)
ALL = "all"
"""The source of a format 1 dataset that was built from several: its one stream holds them all."""


class TokenizerFacts(BaseModel, frozen=True):
    """The tokenizer that made the tokens."""

    sha256: str
    vocab_size: int
    type: str
    eos_id: int
    unk_id: int
    """-1 if every text has a spelling."""
    sentinels: list[int] = []
    """Tokens that no text gives, for span corruption."""


class InputFile(BaseModel, frozen=True):
    """A file of text, as it lay on disk."""

    path: str
    bytes: int
    xxh3: str


class SourceFacts(BaseModel, frozen=True):
    """What one source came to. Its train shards, one after the other, are a token stream of its own."""

    name: str
    inputs: list[InputFile]
    documents: int
    """Documents that went into the dataset."""
    bytes: int
    """UTF-8 bytes of their text."""
    tokens: dict[Split, int]
    """Tokens of its stream in each split; 0 where it has none."""
    split_documents: dict[Split, int]
    """Documents with text in each split."""
    split_bytes: dict[Split, int]
    """UTF-8 bytes of text in each split."""
    dropped: dict[str, int]
    """Documents left out, by reason."""
    replaced: int
    """Undecodable bytes that became U+FFFD."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard; `path` is relative to the dataset, `documents` are those that start in it.

    No pydantic model: there may be 64,000 on every rank, and those take 1.5 KB each.
    """

    path: str
    split: Split
    source: str
    """Name of the source whose stream this is a part of."""
    tokens: int
    documents: int
    batches: int
    bytes: int
    xxh3_128: str


class SplitFacts(BaseModel, frozen=True):
    """Totals of one split over all sources."""

    tokens: int
    documents: int
    """Documents with text in this split; a document cut by `tail` counts in both."""
    bytes: int
    """UTF-8 bytes of text: what bits per byte divide by."""
    unknown: int
    """Tokens <unk>: runs of characters that a `char` tokenizer does not know."""
    byte_counts: list[int] | None = None
    """How often each of the 256 byte values occurs (validation only)."""

    def order0_entropy(self) -> float:
        """Bits per byte of a model that knows only how frequent each byte is (NaN where it was not counted)."""
        if self.byte_counts is None:
            return math.nan
        shares = [count / self.bytes for count in self.byte_counts if count]
        return -sum(share * math.log2(share) for share in shares)


class Manifest(BaseModel, frozen=True):
    """The contents of manifest.json. No time, host or output path in it: a rebuild is byte-identical."""

    format: Literal[1, 2, 3, 4] = FORMAT
    fingerprint: str
    """Names the token streams exactly: what the order of samples depends on."""
    identity: dict[str, Any]
    """The configuration and the hashes of the inputs it was built from."""
    tokenizer: TokenizerFacts
    dtype: str
    """uint16 or int32."""
    batch_tokens: int
    """Tokens of each record batch but a shard's last."""
    shard_tokens: int
    """Tokens of each shard but the last of a source in a split."""
    sources: list[SourceFacts]
    shards: list[ShardFacts]
    """By split, then by source (in the order of `sources`), then in stream order."""
    splits: dict[Split, SplitFacts]
    pairs: bool = False
    """Whether each document is a pair of source and target: two texts, each with an end-of-text token."""
    chat_template: str | None = None
    """How messages were written; None: no source holds conversations. With it tokens that are to be written, and not
    only read, are stored as their id plus the size of the vocabulary: they are marked."""
    labels: LabelsConfig | None = None
    """Of texts with labels; None: there are none. A document is its tokens, and behind them its labels, whose numbers
    are added to the size of the vocabulary: one of the whole text, or one of each of its last tokens."""
    weights: dict[str, float] | None = None
    """Shares of the training samples by source, of the configuration it was built with; None: it gave none."""
    repeats: dict[str, float] = {}
    """Epochs of a source at most, of that configuration."""

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Of a dataset's folder or URI; reads the former formats as well.

        Raises DataError when there is none, it is damaged, or its format is unknown."""
        path = join(str(folder), MANIFEST) if is_uri(str(folder)) else Path(folder) / MANIFEST
        if isinstance(path, Path) and (told := mistaken(path.parent, DATASET)):
            raise DataError(f"{folder}: {told}")
        try:
            with open_raw(path) if isinstance(path, str) else open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{folder} is not a dataset: {_instead(folder)}") from None
        except (IsADirectoryError, PermissionError) as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        try:
            data = unseal(content, formats=(FORMAT,))
            found = data.get("format")
            if found not in READABLE:
                raise DataError(
                    f"{path} has format {found!r}, this version reads formats 1 to {FORMAT}: use the version of duet "
                    "that built it, or build again with --overwrite"
                )
            manifest = cls.model_validate(_as_of_today(data))
            for problem in itertools.islice(contradictions(manifest), 1):
                raise ValueError(problem)
            if found != FORMAT and manifest.fingerprint != _fingerprint_of(data):
                raise ValueError("its fingerprint is not that of what it describes")
            if found != FORMAT and [source["name"] for source in data["sources"]] != list(data["identity"]["sources"]):
                raise ValueError("its sources are not those that it was built from")
            return manifest
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise DataError(f"{path} is damaged: {error}; restore it, or build again with --overwrite") from None

    def save(self, folder: Path) -> None:
        """Publishes the dataset."""
        with disk_errors(folder / MANIFEST):
            unused = {key for key in ("chat_template", "labels") if getattr(self, key) is None}  # as if never there
            write_atomic(folder / MANIFEST, seal(self.model_dump_json(indent=1, exclude=unused)))

    @property
    def stored_ids(self) -> int:
        """What is stored of a token is below this."""
        labels = 0 if self.labels is None else self.labels.values
        return self.tokenizer.vocab_size * (2 if self.chat_template is not None else 1) + labels

    def plain(self, tokens: "np.ndarray") -> "np.ndarray":
        """Ids of stored tokens, whether they are marked or not; -1 stays. Of labels end-of-text, which is no text."""
        vocab_size = self.tokenizer.vocab_size
        if self.labels is not None:
            return tokens.clip(max=vocab_size) - (tokens >= vocab_size) * (vocab_size - self.tokenizer.eos_id)
        if self.chat_template is None:
            return tokens
        return tokens - vocab_size * (tokens >= vocab_size)

    def shards_of(self, split: Split, source: str | None = None) -> list[ShardFacts]:
        """The shards of a split in stream order: of one source, or of all in the order of `sources`."""
        return [shard for shard in self.shards if shard.split == split and source in (None, shard.source)]


def _instead(folder: Path | str) -> str:
    """What a place without a manifest is, and the way on."""
    place = Path(folder)
    if is_uri(str(folder)):
        return f"it has no {MANIFEST}; `duet data upload` copies one there"
    if not place.exists():
        return f"there is no such folder (from {Path.cwd()}); `duet data build` makes one"
    if (place / WORK).is_dir():
        return "its build has not ended; the same `duet data build` goes on with it"
    source = f"data.sources.mine.paths=[{folder}]"
    return f"it has no {MANIFEST}. If it is your text, `duet data build {shlex.quote(source)} data.path=NEW` makes one"


def _as_of_today(data: dict[str, Any]) -> dict[str, Any]:
    """A manifest of any format as one of this version."""
    if data["format"] == FORMAT:
        return data
    return (_with_one_source(data) if data["format"] == 1 else data) | {"pairs": data["format"] == PAIRS}


def _with_one_source(data: dict[str, Any]) -> dict[str, Any]:
    """A format 1 manifest as one of today: its one stream a split is that of its only source, or of ALL."""
    splits, sources = data["splits"], data["sources"]
    names = [source["name"] for source in sources if source["name"] != GIVEN]
    name = names[0] if len(names) == 1 else ALL
    merged = {
        "name": name,
        "inputs": [file for source in sources for file in source["inputs"]],
        "documents": sum(source["documents"] for source in sources),
        "bytes": sum(source["bytes"] for source in sources),
        "tokens": {split: facts["tokens"] for split, facts in splits.items()},
        "split_documents": {split: facts["documents"] for split, facts in splits.items()},
        "split_bytes": {split: facts["bytes"] for split, facts in splits.items()},
        "dropped": sum((Counter(source["dropped"]) for source in sources), Counter()),
        "replaced": sum(source["replaced"] for source in sources),
    }
    return {**data, "sources": [merged], "shards": [{**shard, "source": name} for shard in data["shards"]]}


def contradictions(manifest: Manifest) -> Iterator[str]:
    """What cannot be true of any dataset, or of two keys not at once."""
    vocabulary = manifest.stored_ids
    if not 1 <= vocabulary < 2**31 or manifest.dtype != ("uint16" if vocabulary <= 2**16 else "int32"):
        yield f"tokens of a vocabulary of {vocabulary} are not stored as {manifest.dtype!r}"
    if not 1 <= manifest.batch_tokens <= manifest.shard_tokens:
        yield f"shards of {manifest.shard_tokens} tokens cannot have batches of {manifest.batch_tokens}"
        return
    names = {source.name for source in manifest.sources}
    totals: Counter[tuple[str, str]] = Counter()
    ended: set[tuple[str, str]] = set()
    for shard in manifest.shards:
        stream = (shard.split, shard.source)
        if stream in ended or not 1 <= shard.tokens <= manifest.shard_tokens or shard.source not in names:
            yield f"shard {shard.path} has {shard.tokens} tokens of {shard.source} where {manifest.shard_tokens} fit"
        if shard.tokens < manifest.shard_tokens:
            ended.add(stream)
        if shard.batches != -(-shard.tokens // manifest.batch_tokens) or not 0 <= shard.documents <= shard.tokens:
            yield f"shard {shard.path} cannot have {shard.batches} batches and {shard.documents} documents"
        folder, _, name = shard.path.partition("/")
        if folder != shard.split or "/" in name or not name.endswith(".arrow"):
            yield f"shard {shard.path} does not lie in {shard.split}"
        totals[stream] += shard.tokens
    if len({shard.path for shard in manifest.shards}) < len(manifest.shards) or len(names) < len(manifest.sources):
        yield "a shard or a source is there twice"
    for source in manifest.sources:
        for split, tokens in source.tokens.items():
            if tokens != totals[split, source.name]:
                yield f"{source.name} has {totals[split, source.name]} {split} tokens in its shards, not {tokens}"
    for split, facts in manifest.splits.items():
        for key, of_source in (("tokens", "tokens"), ("documents", "split_documents"), ("bytes", "split_bytes")):
            if getattr(facts, key) != sum(getattr(source, of_source).get(split, 0) for source in manifest.sources):
                yield f"the {key} of the {split} split are not those of the sources"
        if facts.byte_counts is not None and (len(facts.byte_counts), sum(facts.byte_counts)) != (256, facts.bytes):
            yield f"the byte_counts of the {split} split do not count its bytes"
    shares = [*(manifest.weights or {}).items(), *manifest.repeats.items()]
    if not all(name in names and math.isfinite(share) and share >= 0 for name, share in shares):
        yield "its weights or repeats are of sources that are not there, or no numbers above 0"


def fingerprint(tokenizer: TokenizerFacts, dtype: str, split_rule: dict[str, Any], shards: list[ShardFacts]) -> str:
    """sha256 of everything the order and content of samples depend on; free of paths and times.

    A source's weight is no part of it: it says how often the stream is read, not what is in it.
    """
    facts = tokenizer.model_dump(exclude_defaults=True)
    return _fingerprint(STREAMS, facts, dtype, split_rule, [asdict(shard) for shard in shards])


def _fingerprint_of(data: dict[str, Any]) -> str:
    """That of a manifest of a former version, from what it says."""
    identity = data["identity"]
    rule = {key: identity["split"][key] for key in ("rule", "fraction")} | {
        key: identity[key] for key in ("seed", "cut")
    }
    if data["format"] == PAIRS:
        rule["pairs"] = True
    tokenizer = TokenizerFacts.model_validate(data["tokenizer"]).model_dump(exclude_defaults=True)
    return _fingerprint(min(data["format"], STREAMS), tokenizer, data["dtype"], rule, data["shards"])


def _fingerprint(
    number: int, tokenizer: dict[str, Any], dtype: str, split_rule: dict[str, Any], shards: list[dict[str, Any]]
) -> str:
    facts = {
        "format": number,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "split": split_rule,
        "shards": [{key: value for key, value in shard.items() if key != "path"} for shard in shards],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two identities, a line each: `key: value there, value here`."""
    old, new = dict(_flat(there)), dict(_flat(here))
    keys = [*old, *(key for key in new if key not in old)]
    return [
        f"{key}: {old.get(key, 'nothing')} there, {new.get(key, 'nothing')} here"
        for key in keys
        if old.get(key, ...) != new.get(key, ...)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
