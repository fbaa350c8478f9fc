"""Objectives as collators over one token stream: windows in, model inputs and labels out.

What is random depends on the run's seed and a sample's position alone: any rank, batch or restart makes the same.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sampling.shuffle import hashed
from data_pipeline.tokenize.tokenizer import Tokenizer

IGNORE = -100
"""A label that counts for nothing."""
MASK = "<mask>"


class Sequences(NamedTuple):
    """The documents in inputs [B, T]; each row begins a sequence."""

    cu_seqlens: np.ndarray
    """Where sequences begin in the flattened inputs, and the end: int32 [sequences + 1], as flash attention wants."""
    segment_ids: np.ndarray
    """Number of the sequence in its row, from 0: int32 [B, T]."""
    position_ids: np.ndarray
    """Place in its sequence, from 0: int64 [B, T]."""


def sequences(document_starts: np.ndarray, rows: int, context: int) -> Sequences:
    """`document_starts`: `row * (T + 1) + column`, ascending, as a reader gives them. Padding is a sequence, too."""
    row, column = np.divmod(document_starts, context + 1)
    inside = column < context  # The last token of a window is a label only.
    begins = np.zeros((rows, context), bool)
    begins[:, 0] = True
    begins[row[inside], column[inside]] = True
    where = np.flatnonzero(begins)
    flat = np.arange(rows * context)
    lengths = np.diff(where, append=rows * context)
    return Sequences(
        np.append(where, rows * context).astype(np.int32),
        np.cumsum(begins, axis=1, dtype=np.int32) - 1,
        (flat - np.repeat(where, lengths)).reshape(rows, context),
    )


def causal(tokens: np.ndarray, document_starts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, T] and the token after each, of windows int64 [B, T + 1]; IGNORE where there is none (-1).

    With `document_starts`, the first token of a document is nobody's label: what came before has no say in it.
    """
    labels = np.where(tokens[:, 1:] < 0, IGNORE, tokens[:, 1:])
    if document_starts is not None:
        row, column = np.divmod(document_starts, tokens.shape[1])
        labels[row, column - 1] = IGNORE
    return np.maximum(tokens[:, :-1], 0), labels


def prefix(tokens: np.ndarray, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prefix language model (Raffel et al. 2020, section 3.2): inputs [B, T], labels [B, T], prefix lengths int64 [B].

    A prefix of 1 to T - 1 tokens, all as likely, may look both ways; labels begin with the token behind it.
    """
    inputs, labels = causal(tokens)
    context = inputs.shape[1]
    lengths = 1 + (hashed(seed, "prefix", positions, 1)[:, 0] % np.uint64(max(1, context - 1))).astype(np.int64)
    labels[np.arange(context) < lengths[:, None] - 1] = IGNORE
    return inputs, labels, lengths


def joined_pairs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs int64 [B, 2 T] for a decoder alone: inputs [B, T], labels [B, T], prefix lengths int64 [B], and which
    inputs are padding, bool [B, T].

    The source is the prefix, which may be seen whole; labels are the target's. Of pairs of more than T + 1 tokens the
    source is cut to what the target leaves, but not below half of them, and then the target.
    """
    rows, context = len(tokens), tokens.shape[1] // 2
    sources, targets = tokens[:, :context], tokens[:, context:]
    lengths, wanted = (sources >= 0).sum(axis=1), (targets >= 0).sum(axis=1)
    room = context + 1
    prefixes = np.minimum(lengths, np.maximum(room - wanted, room // 2))
    joined = np.full((rows, room), -1, np.int64)
    for row, prefix in enumerate(prefixes.tolist()):
        joined[row, :prefix] = sources[row, :prefix]
        target = min(int(wanted[row]), room - prefix)
        joined[row, prefix : prefix + target] = targets[row, :target]
    inputs, labels = causal(joined)
    labels[np.arange(context) < prefixes[:, None] - 1] = IGNORE
    return inputs, labels, prefixes, joined[:, :-1] < 0


def masked(
    tokens: np.ndarray,
    positions: np.ndarray,
    seed: int,
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    spared: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Masked language model (Devlin et al. 2019, section 3.1): inputs [B, T] and labels [B, T], IGNORE if not chosen.

    Each of the first T tokens of a window is chosen with probability `rate`, but those in `spared` (such as EOS). Of
    the chosen 80 % become `mask_id`, 10 % a token drawn evenly from the vocabulary, 10 % stay.
    """
    inputs = tokens[:, :-1].copy()
    choose, change, other = (
        hashed(seed, f"mask {draw}", positions, inputs.shape[1]) for draw in ("choose", "change", "other")
    )
    chosen = (choose < _threshold(rate)) & (inputs >= 0) & ~np.isin(inputs, list(spared))
    labels = np.where(chosen, inputs, IGNORE)
    inputs[chosen & (change < _threshold(0.8))] = mask_id
    drawn = chosen & (change >= _threshold(0.8)) & (change < _threshold(0.9))
    inputs[drawn] = (other[drawn] % np.uint64(vocab_size)).astype(np.int64)
    return np.maximum(inputs, 0), labels


def _threshold(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2**64), 2**64 - 1))


class SpanCorruption:
    """T5's objective (Raffel et al. 2020, section 3.1.4): spans are cut out, each leaves a sentinel, and is to be told.

    All windows have the same numbers of spans and of tokens cut out, so shapes are fixed: inputs [B, T - noise + spans
    + 1], labels [B, noise + spans + 1], both with EOS at the end.
    """

    def __init__(
        self, context: int, sentinels: Sequence[int], eos_id: int, density: float = 0.15, mean_span: float = 3.0
    ) -> None:
        """`density`: share of tokens that are cut out. Raises DataError when there are too few sentinels."""
        self.noise = min(max(round(context * density), 1), context - 1)
        self.spans = min(max(round(self.noise / mean_span), 1), self.noise, context - self.noise)
        if len(sentinels) < self.spans:
            raise DataError(
                f"span corruption of {context} tokens needs {self.spans} sentinels, the tokenizer has "
                f"{len(sentinels)}: set data.tokenizer.sentinels={self.spans} and build again, or use a shorter context"
            )
        self.context = context
        self._sentinels = np.array(sentinels[: self.spans], np.int64)
        self._eos_id = eos_id

    def __call__(self, tokens: np.ndarray, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first T tokens of whole windows [B, T + 1]."""
        rows = len(tokens)
        kept = self._lengths(self.context - self.noise, hashed(seed, "kept", positions, self.context - self.noise - 1))
        cut = self._lengths(self.noise, hashed(seed, "cut", positions, self.noise - 1))
        inputs = np.empty((rows, self.context - self.noise + self.spans + 1), np.int64)
        labels = np.empty((rows, self.noise + self.spans + 1), np.int64)
        for row in range(rows):
            lengths = np.stack([kept[row], cut[row]], axis=1).ravel()
            is_cut = np.repeat(np.tile([False, True], self.spans), lengths)
            window = tokens[row, :-1]
            inputs[row, :-1] = np.insert(window[~is_cut], np.cumsum(kept[row]), self._sentinels)
            labels[row, :-1] = np.insert(window[is_cut], np.cumsum(cut[row]) - cut[row], self._sentinels)
        inputs[:, -1] = labels[:, -1] = self._eos_id
        return inputs, labels

    def _lengths(self, total: int, draws: np.ndarray) -> np.ndarray:
        """`total` tokens in as many parts as there are spans, none empty, all ways as likely: int64 [B, spans].

        The smallest of the draws, one for each gap between two tokens, say where to cut.
        """
        cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : self.spans - 1], axis=1) + 1
        return np.diff(cuts, axis=1, prepend=0, append=total)


def mask_id(tokenizer: Tokenizer) -> int:
    """Id of the tokenizer's mask. Raises DataError if it has none."""
    for token in range(tokenizer.vocab_size):
        if tokenizer.piece(token) == MASK:
            return token
    raise DataError(f"the tokenizer has no {MASK}: add it to data.tokenizer.user_defined_symbols and build again")
