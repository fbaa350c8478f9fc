"""Configuration of the data pipeline. Free of heavy imports: login nodes read this."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from data_pipeline import may_change
from data_pipeline.secret import WAY_ON, has_secret


def _without_a_secret(place: str) -> str:
    if has_secret(place):
        raise ValueError(WAY_ON)
    return place


_LONGEST_SYMBOL = 1000
CHAT_TEMPLATE = "{role}\n{content}{eos}"
_HALF = re.compile("[\ud800-\udfff]")
Place = Annotated[str, AfterValidator(_without_a_secret)]
"""A path or a URI."""


class FilterConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which documents of a source are kept. Every one left out is counted by reason."""

    min_chars: Annotated[int, may_change.BUILD] = Field(default=0, ge=0)
    """Documents of fewer characters are left out."""
    max_chars: Annotated[int | None, may_change.BUILD] = Field(default=None, ge=1)
    """Documents of more characters are left out."""
    language: Annotated[str | None, may_change.BUILD] = None
    """Only documents whose `language_key` holds exactly this (JSONL and tables)."""
    language_key: Annotated[str, may_change.BUILD] = "language"
    """Key or column of a document's language."""
    function: Annotated[str | None, may_change.BUILD] = Field(default=None, pattern=r"^([\w.]+|.+\.py):\w+$")
    """`FILE.py:function` or `module:function` of your own, called with the text and the record it came in; a false
    result leaves the document out. What it returns may depend on its arguments only. A file is looked for from the
    folder you are in, and its content belongs to what the dataset is made from; a module must be importable."""

    @model_validator(mode="after")
    def _lengths_are_possible(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars={self.max_chars} is below min_chars={self.min_chars}: nothing would be left")
        return self


class DuplicateConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which documents count as copies of an earlier one, over all sources. The first in the order of input stays."""

    rule: Annotated[Literal["keep", "exact", "near"], may_change.BUILD] = "keep"
    """`keep`: all stay; `exact`: the same text goes; `near`: also what shares most of its word sequences with an
    earlier document (MinHash; needs the extra `near`)."""
    threshold: Annotated[float, may_change.BUILD] = Field(default=0.8, gt=0.0, lt=1.0)
    """`near`: Jaccard similarity from which a document is most likely taken for a copy."""
    words: Annotated[int, may_change.BUILD] = Field(default=5, ge=1)
    """`near`: words in a sequence."""
    permutations: Annotated[int, may_change.BUILD] = Field(default=128, ge=16, le=1024)
    """`near`: hash functions; more tell similar from dissimilar more sharply."""


def told_names(names: Sequence[str], most: int = 20) -> str:
    """Names of labels for a message, of many the first."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


class LabelsConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What is known of each text, for `data.objective=labels` (docs/labels.md)."""

    kind: Annotated[Literal["none", "sequence", "token", "span"], may_change.BUILD] = "none"
    """`sequence`: a label of each text; `token`: one of each of its words, or of stretches of it; `span`: where in a
    text the answer to a question stands. JSON Lines hold it under the `label_key` of their source."""
    names: Annotated[list[str], may_change.BUILD] = []
    """All labels there are; of `token`, the first is that of what no stretch holds. None of `span`."""

    @field_validator("names", mode="before")
    @classmethod
    def _numbers_are_names(cls, names: Any) -> Any:
        if isinstance(names, list) and (truths := [name for name in names if isinstance(name, bool)]):
            raise ValueError(
                f"YAML reads {truths[0]} there, and not a name; quote names such as yes: names=['yes','no']"
            )
        whole = isinstance(names, list) and all(type(name) in (int, str) for name in names)
        return [str(name) for name in names] if whole else names

    @property
    def values(self) -> int:
        """Numbers of labels are below this: of `span` whether a token is in the answer; the last stands for none."""
        return (2 if self.kind == "span" else len(self.names)) + 1

    @model_validator(mode="after")
    def _names_tell_labels_apart(self) -> Self:
        if self.kind in ("none", "span"):
            if self.names:
                raise ValueError(f"names are labels of kind=sequence or token; with kind={self.kind} there are none")
        elif len(self.names) < 2:
            raise ValueError(
                f"names: kind={self.kind} needs all labels there are, two at least, such as names=[good,bad]"
            )
        for name, times in Counter(self.names).items():
            if not name or _HALF.search(name) or times > 1:
                raise ValueError(f"names: {name!a} cannot be a label (empty, half a surrogate pair, or there twice)")
        return self


class SourceConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One named body of text."""

    paths: Annotated[list[Place], may_change.BUILD] = Field(min_length=1)
    """Files, directories (all files below, hidden ones left out) or globs; local paths or URIs (s3://, gs://, …). A
    name ending in .jsonl, .ndjson or .json holds one JSON object a line, in .parquet, .arrow or .feather one document a
    row; any other is plain text, one document a file. All but .parquet may also end in .gz, .zst, .bz2 or .xz."""
    text_key: Annotated[str, may_change.BUILD] = "text"
    """Key of the text in a JSONL object, or column of a table."""
    target_key: Annotated[str | None, may_change.BUILD] = None
    """Key or column of a second text, which makes each object or row a pair: `text_key` is read, this one is to be
    written (`data.objective=pairs`). All sources have one, or none has."""
    prefix: Annotated[str, may_change.BUILD] = ""
    """Of pairs: a text before each source, which names the task where several are mixed ("summarize: ")."""
    messages_key: Annotated[str | None, may_change.BUILD] = None
    """Key of a conversation in a JSONL object, instead of `text_key`: a list of objects with `role` (system, user or
    assistant) and `content`. With one such source a dataset is for `data.objective=conversations`: pairs are questions
    with their answers then, and plain text is to be written whole."""
    label_key: Annotated[str, may_change.BUILD] = "label"
    """With `data.labels`: key of what is known of the text in a JSONL object."""
    question_key: Annotated[str, may_change.BUILD] = "question"
    """With `data.labels.kind=span`: key of the question; `text_key` is that of the text in which the answer stands."""
    filter: FilterConfig = FilterConfig()
    weight: Annotated[float | None, may_change.PHASE] = Field(default=None, gt=0.0)
    """Share of the training samples that come from this source, beside the weights of the others; what it has of tokens
    unless given. Kept with the dataset, whose tokens do not depend on it, for runs without weights of their own."""
    repeat: Annotated[float | None, may_change.PHASE] = Field(default=None, gt=0.0)
    """At most this many epochs of this source; without it as many as its weight asks for. Kept as `weight` is."""

    @model_validator(mode="after")
    def _a_prefix_stands_before_a_source(self) -> Self:
        if self.prefix and self.target_key is None:
            raise ValueError(
                f"prefix={self.prefix!r} names the task of pairs, and there is no target_key: leave it out"
            )
        if _HALF.search(self.prefix):
            raise ValueError(f"prefix={self.prefix!a} holds half a surrogate pair, which is no text")
        return self


class TokenizerConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How the SentencePiece tokenizer is trained. It sees training text only."""

    type: Annotated[Literal["unigram", "bpe", "char"], may_change.BUILD] = "unigram"
    """Model of SentencePiece; `unigram` and `bpe` spell unknown characters in bytes."""
    vocab_size: Annotated[int, may_change.BUILD] = Field(default=8192, ge=3)
    """Pieces in the vocabulary; an upper bound for type `char`."""
    character_coverage: Annotated[float, may_change.BUILD] = Field(default=1.0, gt=0.9, le=1.0)
    """Share of the text's characters that get a piece; rarer ones become bytes (`char`: unknown)."""
    user_defined_symbols: Annotated[list[str], may_change.BUILD] = ["\n"]
    """Strings that are always one piece. A newline, so that line structure survives and stays cheap. Those of a `model`
    must be among its pieces, if others than the default are given."""
    sentinels: Annotated[int, may_change.BUILD] = Field(default=0, ge=0, le=1000)
    """Pieces <extra_id_0>, <extra_id_1>, … that no text gives: for span corruption. Counted in `vocab_size`."""
    model: Annotated[str | None, may_change.BUILD] = None
    """A SentencePiece .model or a Hugging Face tokenizer.json (needs the extra `tokenizers`) to take as it is. The
    other settings of training have no effect then."""
    sample_bytes: Annotated[int, may_change.BUILD] = Field(default=64 * 2**20, ge=1024)
    """Train on at most this many bytes of text, sampled over all sources with `data.seed`."""

    @model_validator(mode="after")
    def _symbols_are_usable(self) -> Self:
        taken = {"<unk>", "</s>", *(f"<extra_id_{number}>" for number in range(self.sentinels))}
        if self.type != "char":
            taken |= {f"<0x{byte:02X}>" for byte in range(256)}
        seen: set[str] = set()
        for symbol in self.user_defined_symbols:
            if not symbol or "\0" in symbol or symbol in taken or _HALF.search(symbol):
                raise ValueError(
                    f"user_defined_symbols: {symbol!r} cannot be one (empty, NUL, half a surrogate pair, or a special "
                    "piece)"
                )
            if len(symbol) > _LONGEST_SYMBOL:
                raise ValueError(
                    f"user_defined_symbols: {symbol[:20]!r}… has {len(symbol)} characters; {_LONGEST_SYMBOL} at most"
                )
            if symbol.replace("\u2581", " ") in seen:
                raise ValueError(f"user_defined_symbols: {symbol!r} is there twice (U+2581 is a space); name it once")
            seen.add(symbol.replace("\u2581", " "))
        return self


class SplitConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which text is held out for validation. Part of the dataset's fingerprint."""

    rule: Annotated[Literal["hash", "tail", "given"], may_change.BUILD] = "hash"
    """`hash`: whole documents by a hash of their text (of its first MiB or so if it is longer); `tail`: the end of each
    source's text; `given`: the documents of `files`."""
    fraction: Annotated[float, may_change.BUILD] = Field(default=0.01, gt=0.0, lt=1.0)
    """Share held out by `hash` (of documents) and `tail` (of UTF-8 bytes)."""
    files: Annotated[list[Place], may_change.BUILD] = []
    """Validation files for `given`: as `paths` of a source."""
    text_key: Annotated[str, may_change.BUILD] = "text"
    """Key of the text in the JSONL objects of `files`."""
    target_key: Annotated[str | None, may_change.BUILD] = None
    """As `target_key` of a source, for `files`."""
    messages_key: Annotated[str | None, may_change.BUILD] = None
    """As `messages_key` of a source, for `files`."""
    label_key: Annotated[str, may_change.BUILD] = "label"
    """As `label_key` of a source, for `files`."""
    question_key: Annotated[str, may_change.BUILD] = "question"
    """As `question_key` of a source, for `files`."""
    prefix: Annotated[str | None, may_change.BUILD] = None
    """As `prefix` of a source, for `files`; where sources have one it has to be said, if only that there is none, since
    the texts in `files` begin with it."""

    @model_validator(mode="after")
    def _files_belong_to_given(self) -> Self:
        if (self.rule == "given") != bool(self.files):
            raise ValueError(f"files and rule=given need each other; here rule={self.rule}, {len(self.files)} files")
        if self.prefix and self.target_key is None:
            raise ValueError(
                f"prefix={self.prefix!r} names the task of pairs, and there is no target_key: leave it out"
            )
        return self


class DataConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A dataset: where it is, what it is built from, and what is made of it to learn from."""

    path: Annotated[Place, may_change.PLACE] = "data/dataset"
    """The dataset's folder (manifest, tokenizer, shards); `duet train` also reads from a URI (s3://, gs://, …)."""
    cache: Annotated[str | None, may_change.PLACE] = None
    """A folder on the node's own disk, in TMPDIR unless given: shards of a dataset at a URI are kept in `duet-cache`
    there."""
    cache_bytes: Annotated[int, may_change.PLACE] = Field(default=64 * 2**30, ge=1)
    """At most this many bytes are kept there; those least recently used go."""
    sources: Annotated[dict[str, SourceConfig], may_change.BUILD] = {}
    """Raw text by name; needed by `duet data`, not by `duet train`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    split: SplitConfig = SplitConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    labels: LabelsConfig = LabelsConfig()
    chat_template: Annotated[str, may_change.BUILD] = CHAT_TEMPLATE
    """How a message of a conversation is written: a text with `{role}` and, behind it, `{content}`. Directly behind the
    content stands a piece that no text gives, which ends a turn: `{eos}`, the tokenizer's end-of-text, or one of its
    own, such as `<|im_end|>`."""
    shuffle: Annotated[bool, may_change.BUILD] = False
    """Put the training documents of each source into a random order, which depends on `seed` alone. Without it they
    stand as in the input."""
    errors: Annotated[Literal["strict", "replace"], may_change.BUILD] = "strict"
    """Bytes that are not UTF-8: an error that names file and offset, or U+FFFD in their place."""
    seed: Annotated[int, may_change.BUILD] = Field(default=0, ge=0, lt=2**63)
    """Seeds the tokenizer's sample, the hash split and the shuffle."""
    shard_tokens: Annotated[int, may_change.BUILD] = Field(default=128 * 2**20, ge=1024)
    """Tokens in a shard (the last of a source in a split may hold fewer)."""
    objective: Annotated[str, may_change.IN_FORK] = "causal"
    """What a model learns from the text: the next token; the same behind a prefix that is read both ways; tokens hidden
    by `<mask>` (BERT), which it needs among `tokenizer.user_defined_symbols`; spans cut out, each for a sentinel (T5),
    of `tokenizer.sentinels`; the target of a source, of a dataset built with `target_key`; what the assistant says, of
    one built with `messages_key`; the labels of one built with `data.labels`. Each needs a `model.architecture` that
    fits."""
    weights: Annotated[dict[str, float], may_change.PHASE] = {}
    """Shares of the training samples by source, instead of the sources' own `weight`, or of those that the dataset was
    built with; a source left out is not read."""
    order: Annotated[Literal["global", "block"], may_change.PHASE] = "global"
    """`global`: any window of a source may come next, which suits local disks; `block`: those of 16 shards at a
    time."""
    packing: Annotated[Literal["plain", "best_fit"], may_change.PHASE] = "plain"
    """`plain`: windows run on over documents; `best_fit`: documents share windows, and none is cut unless it is longer
    than a window (objectives `causal` and `masked`). `model.document_mask` keeps them apart."""
    mask_boundaries: Annotated[bool, may_change.IN_FORK] = False
    """The first token of a document is nobody's label (`causal`), as it is with `model.document_mask`."""
    exhausted: Annotated[Literal["stop", "drop"], may_change.PHASE] = "stop"
    """When a source has been read as often as its `repeat` allows: an error before training, or go on without it."""
    phase: Annotated[int, may_change.PHASE] = Field(default=1, ge=1)
    """Raise it by one to go on with other data, weights or order in the same run: the change begins a new phase."""

    @property
    def chat(self) -> bool:
        """Whether sources hold conversations."""
        return any(source.messages_key is not None for source in self.sources.values())

    @property
    def pairs(self) -> bool:
        """Whether the sources hold pairs of texts, and nothing else."""
        return not self.chat and any(source.target_key is not None for source in self.sources.values())

    @property
    def labelled(self) -> bool:
        """Whether something is known of each text."""
        return self.labels.kind != "none"

    def stored_ids(self, vocab_size: int) -> int:
        """What is stored of a token is below this: marks of conversations, and labels, lie above the vocabulary."""
        return vocab_size * (1 + self.chat) + (self.labels.values if self.labelled else 0)

    @model_validator(mode="after")
    def _labels_are_of_texts(self) -> Self:
        if self.labelled and (self.chat or self.pairs or self.split.target_key or self.split.messages_key):
            raise ValueError("labels: they are of texts, and not of pairs or conversations: leave one of them out")
        if self.labelled and self.split.rule == "tail":
            raise ValueError("split.rule=tail cuts within a text, and its labels are of all of it; take hash or given")
        return self

    @model_validator(mode="after")
    def _conversations_are_whole(self) -> Self:
        head, _, tail = self.chat_template.partition("{content}")
        if "{role}" not in head or not tail or "{content}" in tail or "{role}" in tail:
            raise ValueError(
                f"chat_template: {self.chat_template!r} must hold {{role}}, then {{content}} once, and behind it what "
                f"ends a turn, where no role stands, as {CHAT_TEMPLATE!r} does"
            )
        places: dict[str, SourceConfig | SplitConfig] = {f"sources.{name}": of for name, of in self.sources.items()}
        for name, of in (places | {"split": self.split}).items():
            if of.messages_key is not None and of.target_key is not None:
                raise ValueError(f"{name}: messages_key and target_key: it holds conversations or pairs; name one")
        if self.split.messages_key is not None and not self.chat:
            raise ValueError("split.messages_key is set, and no source holds conversations")
        if self.chat and self.split.rule == "tail":
            raise ValueError("split.rule=tail cuts within a text, and a conversation would be torn; take hash or given")
        return self

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> Self:
        if not self.pairs:
            return self
        given = {f"sources.{name}": source.target_key for name, source in self.sources.items()}
        if self.split.rule == "given":
            given["split"] = self.split.target_key
        if lacking := [name for name, key in given.items() if key is None]:
            raise ValueError(f"{lacking[0]}.target_key is not set, and others are: a dataset holds pairs, or none")
        if self.split.rule == "tail":
            raise ValueError("split.rule=tail cuts within a text, and a pair would be torn; take hash or given")
        return self
