from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import Tokenizer, sample, train_tokenizer
from tests.corpora import corpora
from tests.data_pipeline.conftest import prose


@cache
def trained(kind: str) -> Tokenizer:
    settings = TokenizerConfig.model_validate({"type": kind, "vocab_size": 500, "character_coverage": 0.999})
    return Tokenizer(train_tokenizer([prose(4000)], settings, seed=0))


AWKWARD = [
    "\0",
    "\r\n",
    "\t",
    "  ",
    "\n\n ",
    "\u2581",
    "\u2585",
    "אבג",
    "\u202e",
    "😀",
    "e\u0301",
    "</s>",
    "<0x41>",
    "<unk>",
]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(text=st.lists(st.sampled_from([*AWKWARD, "the", "a"]) | st.text(max_size=8), max_size=12).map("".join))
@example(text="")
@example(text=" ")
@example(text="\u2581a \u2581\u2581 b\u2581")
def test_round_trip_is_exact(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode([text])[0]
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert not np.isin(ids, [tokenizer.unk_id, tokenizer.eos_id]).any()
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_real_text_comes_back(tmp_path: Path) -> None:
    text = corpora("tinyshakespeare/input.txt").read_text()[:300_000]
    for kind in ("unigram", "bpe"):
        tokenizer = Tokenizer(train_tokenizer([text], TokenizerConfig(type=kind, vocab_size=1000), 0))
        parts = text.split("\n\n")
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(parts, num_threads=2)] == parts
        assert tokenizer.vocab_size == 1000


def test_a_character_tokenizer_has_one_token_a_character() -> None:
    text = "ab\tc\n\nd  e\r\n漢"
    tokenizer = Tokenizer(train_tokenizer([text], TokenizerConfig(type="char"), 0))
    assert tokenizer.vocab_size == len(set(text)) + 2
    ids = tokenizer.encode([text])[0]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    strange = tokenizer.encode(["a\u2581z\u2585b"])[0]
    # SentencePiece makes one <unk> of a run of unknown characters.
    assert (strange == tokenizer.unk_id).tolist() == [False, True, True, False]


def test_training_is_reproducible_and_ignores_what_is_not_sampled() -> None:
    texts = [prose(300, seed) for seed in range(20)]
    for kind in ("unigram", "bpe", "char"):
        settings = TokenizerConfig(type=kind, vocab_size=400, character_coverage=0.995, sample_bytes=20_000)
        first = train_tokenizer(texts, settings, 3)
        assert first == train_tokenizer(iter(texts), settings, 3)


@pytest.mark.parametrize("character", ["\0", "\t", "\u2581", "\u2585", "\r", "\u2028"])
def test_no_character_makes_the_trainer_skip_its_text(character: str) -> None:
    """SentencePiece skips a sentence with U+2585, and one above max_sentence_length, without an error."""
    text = f"{character}zebra " * 3000
    tokenizer = Tokenizer(train_tokenizer([text], TokenizerConfig(type="char"), 0))
    assert not np.isin(tokenizer.encode(["zebra "])[0], tokenizer.unk_id).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100_000}, r"vocab_size=100000 is more than this text supports: set it to at most \d+"),
        ({"vocab_size": 260}, r"vocab_size=260 is too small for the characters.*above \d+"),
        ({"vocab_size": 100_000, "type": "bpe"}, r"at most \d+"),
        ({"vocab_size": 10, "type": "char"}, r"vocab_size=10 is too small.*at least \d+"),
        ({"vocab_size": 400, "user_defined_symbols": ["<0x41>"]}, "SentencePiece cannot train with data.tokenizer"),
    ],
)
def test_impossible_vocabularies_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer([prose(2000)], TokenizerConfig.model_validate(settings), 0)


def test_the_largest_vocabulary_that_is_named_works() -> None:
    with pytest.raises(DataError, match="at most") as raised:
        train_tokenizer([prose(2000)], TokenizerConfig(vocab_size=100_000, character_coverage=0.99), 0)
    largest = int(str(raised.value).rsplit(" ", 1)[1])
    model = train_tokenizer([prose(2000)], TokenizerConfig(vocab_size=largest, character_coverage=0.99), 0)
    assert Tokenizer(model).vocab_size == largest


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([], TokenizerConfig(), 0)


@pytest.mark.parametrize("symbol", ["", "</s>", "<unk>", "a\0"])
def test_special_pieces_cannot_be_symbols(symbol: str) -> None:
    with pytest.raises(ValueError, match="user_defined_symbols"):
        TokenizerConfig(user_defined_symbols=[symbol])


def test_a_sample_is_bounded_spread_and_seeded() -> None:
    texts = [f"{number:06d} " * 400 for number in range(500)]
    picked = sample(texts, 200_000, 1)
    assert 190_000 < sum(map(len, picked)) <= 200_000
    numbers = [int(text[:6]) for text in picked]
    assert numbers == sorted(numbers)
    assert 200 < np.mean(numbers) < 300
    assert picked == sample(texts, 200_000, 1) != sample(texts, 200_000, 2)
    assert "".join(sample(texts, 10**9, 1)) == "".join(texts)


def test_files_that_are_no_models_are_errors(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"spm.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "spm.model")
    with pytest.raises(DataError, match=r"no tokenizer at .*gone.*duet data tokenizer"):
        Tokenizer.load(tmp_path / "gone")
