"""What a person wants to see of a dataset or a tokenizer before training on it."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.build import build_tokenizer
from data_pipeline.config import DataConfig
from data_pipeline.corpus import Corpus, Progress, Split
from data_pipeline.dataset import Dataset
from data_pipeline.tokenizer import Tokenizer, sample

_REPORT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class TokenizerReport:
    """How a tokenizer does on a sample of the training text."""

    vocab_size: int
    sha256: str
    sample_bytes: int
    bytes_per_token: float
    coverage: float
    """Share of the characters that are in the vocabulary, not spelled as bytes or unknown."""
    unknown_rate: float
    """Share of the tokens that are <unk>."""
    longest_pieces: list[str]


def tokenizer_report(config: DataConfig, progress: Progress | None = None, overwrite: bool = False) -> TokenizerReport:
    """Trains the tokenizer (or takes the one there) and measures it. Raises DataError as build_tokenizer does."""
    tokenizer = build_tokenizer(config, progress, overwrite)
    pieces = Corpus(config, progress).pieces("measure", {})
    return measure(tokenizer, sample((piece.text for piece in pieces if piece.split == "train"), _REPORT_BYTES, 0))


def measure(tokenizer: Tokenizer, texts: list[str]) -> TokenizerReport:
    """Measures `tokenizer` on `texts`."""
    characters: Counter[str] = Counter()
    tokens = unknown = size = 0
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        characters.update(text)
        size += len(text.encode())
        tokens += len(ids)
        unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
    known = {character for character in characters if _is_known(tokenizer, character)}
    covered = sum(count for character, count in characters.items() if character in known)
    pieces = [tokenizer.piece(index) for index in range(tokenizer.vocab_size) if not tokenizer.is_byte(index)]
    return TokenizerReport(
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
        sample_bytes=size,
        bytes_per_token=size / max(tokens, 1),
        coverage=covered / max(characters.total(), 1),
        unknown_rate=unknown / max(tokens, 1),
        longest_pieces=sorted(pieces, key=len, reverse=True)[:10],
    )


def _is_known(tokenizer: Tokenizer, character: str) -> bool:
    ids = tokenizer.encode([character])[0].tolist()
    return tokenizer.unk_id not in ids and not any(map(tokenizer.is_byte, ids))


def documents(dataset: Dataset, split: Split, source: str | None = None) -> Iterator[list[np.ndarray]]:
    """Each document of `split`, of one source or of all, in stream order: views of its tokens with their EOS, uint16 or
    int32, which together are the document (one view for each record batch it touches)."""
    rows: list[np.ndarray] = []
    for facts in dataset.shards_of(split, source):
        shard = dataset.shard(facts)
        for batch in range(shard.num_batches):
            tokens, bounds = shard.tokens(batch), shard.rows(batch).tolist()
            continues = shard.continues(batch)
            for begin, end in itertools.pairwise(bounds):
                if rows and not continues:
                    yield rows
                    rows = []
                rows.append(tokens[begin:end])
                continues = False
    if rows:
        yield rows


def length_histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) for each power of two that occurs or lies between two that do."""
    counts = Counter(length.bit_length() for length in lengths)
    if not counts:
        return []
    return [(2 ** (bits - 1), 2**bits - 1, counts[bits]) for bits in range(min(counts), max(counts) + 1)]
