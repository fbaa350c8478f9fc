"""Which documents are copies of earlier ones: by hash of the text, and by MinHash of its word sequences."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from data_pipeline.config import DuplicateConfig
from data_pipeline.errors import DataError

PARTITION = 8 * 2**20
"""Documents that are sorted at once: 24 bytes each and as much again."""


def copies(keys: Sequence[np.ndarray], kept: np.ndarray, partition: int = PARTITION) -> np.ndarray:
    """Whether an earlier kept document has the same key, bool [documents].

    `keys`: one array for each unit of work, uint64 [documents, words], which may be mapped files; `kept`: bool
    [documents] over all units. Works through the keys in parts, by their first word, so that memory is bounded.
    """
    found = np.zeros(len(kept), bool)
    parts = -(-len(kept) // partition)
    for part in range(parts):
        index, words = _part(keys, kept, part, parts)
        # By words, then by place: the first of equals comes first.
        order = np.lexsort((index, *words.T))
        same = np.all(words[order[1:]] == words[order[:-1]], axis=1)
        found[index[order[1:]][same]] = True
    return found


def _part(keys: Sequence[np.ndarray], kept: np.ndarray, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    places, words, before = [], [], 0
    for unit in keys:
        wanted = kept[before : before + len(unit)] & (unit[:, 0] % np.uint64(parts) == part)
        chosen = np.flatnonzero(wanted)
        places.append(chosen + before)
        words.append(unit[chosen])
        before += len(unit)
    return np.concatenate(places), np.concatenate(words)


class NearKeys:
    """Keys of a document of which two alike documents share at least one (MinHash with locality-sensitive hashing:
    Broder, On the resemblance and containment of documents, 1997; Indyk and Motwani, 1998)."""

    def __init__(self, config: DuplicateConfig) -> None:
        """Raises DataError if the library is missing."""
        try:
            from rensa import RMinHash
        except ImportError:
            raise DataError(
                "data.duplicates.rule=near needs the library rensa: pip install 'duet-pretrain[near]', or use exact"
            ) from None
        self._minhash: Any = RMinHash
        self._config = config
        self.bands, self.rows = best_bands(config.threshold, config.permutations)

    def of(self, text: str) -> np.ndarray:
        """uint64 [bands, 1]; a text of fewer words than a sequence is one sequence."""
        words = text.split()
        size = self._config.words
        sequences = [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
        minhash = self._minhash(num_perm=self._config.permutations, seed=0)
        minhash.update(sequences)
        digest = np.array(minhash.digest(), np.uint32)[: self.bands * self.rows].reshape(self.bands, self.rows)
        return np.array(
            [xxhash.xxh3_64_intdigest(row.tobytes(), seed=band) for band, row in enumerate(digest)], np.uint64
        )


def best_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows) whose curve of detection, 1 - (1 - s^rows)^bands at similarity s, errs least around `threshold`:
    the area of wrong detections below it plus that of missed ones above it."""
    similarity = np.linspace(0, 1, 1001)

    def error(bands: int, rows: int) -> float:
        detected = 1 - (1 - similarity**rows) ** bands
        return float(np.where(similarity < threshold, detected, 1 - detected).sum())

    return min(_shapes(permutations), key=lambda shape: error(*shape))


def _shapes(permutations: int) -> Iterator[tuple[int, int]]:
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            yield bands, rows
