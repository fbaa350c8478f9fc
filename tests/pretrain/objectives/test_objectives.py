"""Each objective makes of windows what its paper says, and what `model.batch.Batch` takes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.tokenize.tokenizer import Tokenizer, train_tokenizer
from model.batch import IGNORE as OF_MODELS
from pretrain.objectives.causal import next_tokens
from pretrain.objectives.documents import sequences
from pretrain.objectives.masked import MASK, mask_id
from pretrain.objectives.objective import IGNORE, Setting
from pretrain.objectives.span_corruption import SpanCorruption
from tests.data_pipeline.conftest import prose
from tests.objectives import objective

VOCABULARY = 1000
SENTINEL_IDS = list(range(2000, 2100))
MASK_ID = 700
PIECES: Any = SimpleNamespace(
    vocab_size=VOCABULARY, eos_id=1, sentinel_ids=SENTINEL_IDS, piece=lambda token: MASK if token == MASK_ID else "a"
)
"""What objectives ask a tokenizer for."""


def windows(rows: int, context: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(2, VOCABULARY, (rows, context + 1)), rng.integers(0, 10**12, rows)


def restored(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What was cut out, put back in the place of its sentinel."""
    spans: dict[int, list[int]] = {}
    for token in labels[:-1].tolist():
        if token >= SENTINEL_IDS[0]:
            spans[token] = span = []
        else:
            span.append(token)
    return np.array([x for token in inputs[:-1].tolist() for x in spans.get(token, [token])])


@settings(max_examples=60)
@given(st.integers(2, 300), st.floats(0.05, 0.9), st.floats(1, 10), st.integers(0, 2**31))
def test_span_corruption_is_invertible(context: int, density: float, mean_span: float, seed: int) -> None:
    tokens, positions = windows(3, context, seed)
    try:
        spans = SpanCorruption(Setting(context, lambda: PIECES), density, mean_span)
    except DataError:
        assert context * density / mean_span > 90
        return
    inputs, labels, _ = spans.arrays(tokens, positions, None, seed).values()
    assert inputs.shape == (3, context - spans.noise + spans.spans + 1)
    assert labels.shape == (3, spans.noise + spans.spans + 1)
    assert (inputs[:, -1] == 1).all()
    assert (labels[:, -1] == 1).all()
    for row in range(3):
        assert np.array_equal(restored(inputs[row], labels[row]), tokens[row, :-1])
        for part in (inputs[row], labels[row]):
            assert part[part >= SENTINEL_IDS[0]].tolist() == SENTINEL_IDS[: spans.spans]


def test_spans_lie_anywhere() -> None:
    """As in T5, a window begins with what is kept and ends with a span; in between every token is as likely cut out."""
    tokens = np.repeat(np.arange(65)[None] + 2, 4000, axis=0)
    spans = SpanCorruption(Setting(64, lambda: PIECES))
    inputs = spans.arrays(tokens, np.arange(4000), None, 0)["input_ids"]
    cut = 1 - np.stack([np.isin(tokens[0, :-1], row) for row in inputs]).mean(axis=0)
    assert cut[0] == 0
    assert cut[-1] == 1
    assert abs(cut.mean() - spans.noise / 64) < 1e-9
    assert 0.1 < cut[8:-8].min() < cut[8:-8].max() < 0.2


def test_masked_positions_are_the_only_ones_that_count() -> None:
    tokens, positions = windows(400, 128)
    tokens[:, 5] = 1
    inputs, labels = objective("masked", 128, PIECES).arrays(tokens, positions, None, 7).values()
    original, chosen = tokens[:, :-1], labels != IGNORE
    assert np.array_equal(inputs[~chosen], original[~chosen])
    assert np.array_equal(labels[chosen], original[chosen])
    assert not chosen[:, 5].any()
    assert abs(chosen[:, 6:].mean() - 0.15) < 0.01
    became = inputs[chosen]
    assert abs(np.mean(became == MASK_ID) - 0.8) < 0.02
    assert abs(np.mean(became == original[chosen]) - 0.1) < 0.02
    others = became[(became != MASK_ID) & (became != original[chosen])]
    assert others.max() < VOCABULARY
    assert len(set(others.tolist())) > 300


def test_a_prefix_counts_for_nothing_and_what_follows_does() -> None:
    tokens, positions = windows(500, 16)
    inputs, labels, lengths = objective("prefix").arrays(tokens, positions, None, 0).values()
    assert set(lengths.tolist()) == set(range(1, 16))
    for row, length in enumerate(lengths.tolist()):
        assert (labels[row, : length - 1] == IGNORE).all()
        assert np.array_equal(labels[row, length - 1 :], tokens[row, length:])
    assert np.array_equal(inputs, tokens[:, :-1])


@pytest.mark.parametrize("span", [1, 4])
def test_a_random_order_is_one_of_spans_and_its_last_tokens_are_predicted(span: int) -> None:
    tokens, positions = windows(2000, 24)
    tokens[7, 15:] = -1
    made = objective("permutation", 24, targets=6, target_span=span).arrays(tokens, positions, None, 0)
    assert made.pop("padding").sum(axis=1).nonzero()[0].tolist() == [7]
    inputs, labels, places, asked = made.values()
    order = np.concatenate([places, asked[:, -1:]], axis=1)
    assert np.array_equal(np.sort(order), np.tile(np.arange(25), (2000, 1)))
    assert np.array_equal(order[:, -6:], asked)
    whole = np.take_along_axis(tokens, order, axis=1)
    assert np.array_equal(np.maximum(whole[:, :-1], 0), inputs)
    assert np.array_equal(np.where(whole[:, -6:] < 0, IGNORE, whole[:, -6:]), labels)
    assert order[7, 15:].tolist() == list(range(15, 25)), "what is not there comes last"
    full = np.delete(order, 7, axis=0)
    asked_for = np.bincount(full[:, -6:].ravel(), minlength=25) / len(full)
    assert np.abs(asked_for - 6 / 25).max() < 0.05, "each place about as often"
    joined = (np.diff(full, axis=1) == 1).mean()  # spans of 1 to 4 tokens, 2.5 in the mean, and some by chance
    assert joined == pytest.approx(1 / 25 if span == 1 else 0.645, abs=0.02)


def test_the_chunk_behind_a_start_of_the_window_is_to_be_written() -> None:
    tokens, positions = windows(500, 16)
    tokens[7, 5:] = -1
    made = objective("continuation", 16, PIECES, targets=4).arrays(tokens, positions, None, 0)
    lengths = (~made["padding"]).sum(axis=1)
    assert set(np.delete(lengths, 7).tolist()) == set(range(1, 14)) and lengths[7] == 1
    for row, length in enumerate(lengths.tolist()):
        read, wanted = made["input_ids"][row], tokens[row, length : length + 4]
        assert read.tolist() == [*tokens[row, :length].tolist(), *[0] * (16 - length)]
        assert made["labels"][row].tolist() == wanted.tolist()
        assert made["decoder_input_ids"][row].tolist() == [PIECES.eos_id, *wanted[:-1].tolist()]


@pytest.mark.parametrize("name", ["span_corruption", "masked", "prefix", "permutation", "continuation"])
def test_what_is_random_depends_on_seed_and_position_alone(name: str) -> None:
    tokens, positions = windows(40, 50)
    made = objective(name, 50, PIECES, targets=5, target_span=2)

    def labels(rows: np.ndarray, seed: int) -> np.ndarray:
        return made.arrays(tokens[rows], positions[rows], None, seed)["labels"]

    whole, order = labels(np.arange(40), 1), np.random.default_rng(0).permutation(40)
    parts = np.concatenate([labels(part, 1) for part in np.array_split(order, 7)])
    assert np.array_equal(parts, whole[order])
    other = labels(np.arange(40), 2)
    assert np.mean((other == whole).all(axis=1)) < 0.2


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_sequences_are_those_between_document_starts(marks: list[list[bool]]) -> None:
    """Against a walk over the rows; column 0 always begins one, column T is a label only."""
    rows, context = len(marks), 6
    starts = [row * 7 + column for row in range(rows) for column in range(1, 7) if marks[row][column]]
    segment_ids, position_ids = sequences(np.array(starts, np.int64), rows, context)
    segments, places = [], []
    for row in range(rows):
        segment, place = -1, 0
        for column in range(context):
            if column == 0 or marks[row][column]:
                segment, place = segment + 1, 0
            segments.append(segment)
            places.append(place)
            place += 1
    assert segment_ids.ravel().tolist() == segments
    assert position_ids.ravel().tolist() == places


def test_labels_across_documents_can_be_left_out() -> None:
    tokens = np.array([[5, 6, 7, 8, 9], [4, 3, 2, -1, -1]])
    inputs, labels = next_tokens(tokens)
    assert inputs.tolist() == [[5, 6, 7, 8], [4, 3, 2, 0]]
    assert labels.tolist() == [[6, 7, 8, 9], [3, 2, IGNORE, IGNORE]]
    _, labels = next_tokens(tokens, np.array([2, 4, 6]))
    assert labels.tolist() == [[6, IGNORE, 8, IGNORE], [IGNORE, 2, IGNORE, IGNORE]]


def test_special_pieces_come_from_the_tokenizer() -> None:
    settings = TokenizerConfig(
        vocab_size=400, character_coverage=0.99, user_defined_symbols=["\n", "<mask>"], sentinels=4
    )
    tokenizer = Tokenizer(train_tokenizer([prose(2000)], settings, 0))
    assert tokenizer.piece(mask_id(tokenizer)) == "<mask>"
    objective("span_corruption", 80, tokenizer)
    with pytest.raises(
        DataError, match=r"128 tokens needs 6 sentinels, the tokenizer has 4: set data.tokenizer.sentinels=6"
    ):
        objective("span_corruption", 128, tokenizer)
    plain = Tokenizer(train_tokenizer([prose(2000)], TokenizerConfig(vocab_size=400, character_coverage=0.99), 0))
    assert plain.sentinel_ids == []
    with pytest.raises(DataError, match="the tokenizer has no <mask>"):
        objective("masked", 16, plain)


def test_what_is_ignored_is_the_same_everywhere() -> None:
    assert IGNORE == OF_MODELS
