"""What the data pipeline can be told. Free of heavy imports: login nodes read this."""

from typing import Literal

from pydantic import BaseModel, Field


class SourceConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """One named body of text."""

    paths: list[str] = Field(min_length=1)
    """Files, directories or globs: .txt (and any other plain text), .jsonl; each also .gz or .zst."""
    text_key: str = "text"
    """Key of the text in a JSONL object."""


class TokenizerConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """How the SentencePiece tokenizer is trained."""

    type: Literal["unigram", "bpe", "char"] = "unigram"
    vocab_size: int = Field(default=8192, ge=3)
    """Pieces in the vocabulary; an upper bound for type `char`."""
    character_coverage: float = Field(default=1.0, gt=0.9, le=1.0)
    user_defined_symbols: list[str] = ["\n"]
    """Strings that are always one piece. A newline, so that line structure survives and stays cheap."""
    sample_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Train on at most this many bytes of text, sampled over all sources with `data.seed`."""


class SplitConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Which text is held out for validation. Part of the dataset's fingerprint."""

    rule: Literal["hash", "tail", "given"] = "hash"
    """`hash`: whole documents by a hash of their text; `tail`: the end of each source's text;
    `given`: the documents of `files`."""
    fraction: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Share held out by `hash` (of documents) and `tail` (of UTF-8 bytes)."""
    files: list[str] = []
    """Validation files for `given`."""


class DataConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A dataset: where it is, and what it is built from."""

    path: str = "data/dataset"
    """The dataset's folder (manifest, tokenizer, shards)."""
    sources: dict[str, SourceConfig] = {}
    """Raw text by name; needed by `duet data`, not by `duet train`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    split: SplitConfig = SplitConfig()
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: an error that names file and offset, or U+FFFD in their place."""
    seed: int = 0
    """Seeds the tokenizer's sample and the hash split."""
    shard_tokens: int = Field(default=128 * 2**20, ge=1024)
    """Tokens a shard holds at most."""
