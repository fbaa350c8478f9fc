"""What a person wants to see of a tokenizer before tokenizing everything with it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipeline.building.api import tokenizer_job
from data_pipeline.config import DataConfig
from data_pipeline.ingest.splits import Progress
from data_pipeline.tokenize.tokenizer import Tokenizer

_REPORT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class SourceReport:
    """How a tokenizer does on a sample of the training text of a source."""

    sample_bytes: int
    bytes_per_token: float
    coverage: float
    """Share of the characters that are in the vocabulary, not spelled as bytes or unknown."""
    unknown_rate: float
    """Share of the tokens that are <unk>."""
    round_trip: float
    """Share of the samples (2 to 4 KiB) that come back as they were."""
    longest_pieces: list[str]
    """Of those that occur."""


@dataclass(frozen=True)
class TokenizerReport:
    """A tokenizer, and how it does."""

    vocab_size: int
    sha256: str
    sources: dict[str, SourceReport]
    """Without those that have no training text."""


def tokenizer_report(
    config: DataConfig, progress: Progress | None = None, overwrite: bool = False, processes: int = 1
) -> TokenizerReport:
    """Trains the tokenizer (or takes the one there) and measures it. Raises DataError as build_tokenizer does."""
    with tokenizer_job(config, progress, overwrite, processes) as (job, context, tokenizer):
        samples = job.sample_sources(context, _REPORT_BYTES)
    measured = {name: measure(tokenizer, texts) for name, texts in samples.items() if texts}
    return TokenizerReport(tokenizer.vocab_size, tokenizer.sha256, measured)


def measure(tokenizer: Tokenizer, texts: list[str]) -> SourceReport:
    """Measures `tokenizer` on `texts`."""
    characters: Counter[str] = Counter()
    used = np.zeros(tokenizer.vocab_size, bool)
    tokens = unknown = size = same = 0
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        characters.update(text)
        used[ids] = True
        size += len(text.encode())
        same += tokenizer.decode(ids) == text
        tokens += len(ids)
        unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
    known = {character for character in characters if _is_known(tokenizer, character)}
    covered = sum(count for character, count in characters.items() if character in known)
    pieces = [tokenizer.piece(index) for index in np.flatnonzero(used).tolist() if not tokenizer.is_byte(index)]
    return SourceReport(
        sample_bytes=size,
        bytes_per_token=size / max(tokens, 1),
        coverage=covered / max(characters.total(), 1),
        unknown_rate=unknown / max(tokens, 1),
        round_trip=same / max(len(texts), 1),
        longest_pieces=sorted(pieces, key=len, reverse=True)[:10],
    )


def _is_known(tokenizer: Tokenizer, character: str) -> bool:
    ids = tokenizer.encode([character])[0].tolist()
    return tokenizer.unk_id not in ids and not any(map(tokenizer.is_byte, ids))
