"""Encoding word by word gives the ids of the whole text, or is not done."""

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize import bpe_words
from data_pipeline.tokenize.bpe_words import WordEncoder
from data_pipeline.tokenize.tokenizer import Tokenizer, train_tokenizer
from tests.data_pipeline.conftest import REPOSITORY, prose
from tests.data_pipeline.tokenize.test_tokenizer import AWKWARD

CODE = (REPOSITORY / "data_pipeline" / "tokenize" / "bpe_words.py").read_text()
SYMBOLS = ["\n", "\n\n\n", "  (", "ab", "\t"]

MODELS: dict[str, dict[str, Any]] = {
    "ours": {},
    "symbols": {"user_defined_symbols": SYMBOLS},
    "no newline": {"user_defined_symbols": []},
    "prefix": {"add_dummy_prefix": True, "user_defined_symbols": []},
    "scripts together": {"split_by_unicode_script": False, "split_by_number": False},
}
UNFIT: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "pieces of several words": {"split_by_whitespace": False},
    "a symbol of two words": {"user_defined_symbols": ["the the"]},
    "a symbol over a newline": {"user_defined_symbols": [".\n"]},
    "text is normalised": {"normalization_rule_name": "nmt_nfkc"},
    "spaces are removed": {"remove_extra_whitespaces": True},
    "unknown characters": {"byte_fallback": False},
}


@cache
def model(**changes: Any) -> sentencepiece.SentencePieceProcessor:
    """A model as ours are trained, but for `changes`."""
    file = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\n"],
        "character_coverage": 0.999,
        "minloglevel": 2,
    }
    text = "\n".join([prose(4000), CODE, "the the" * 50]).splitlines()
    changes = {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, **{**settings, **changes})
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def frozen(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}


TEXT = st.lists(
    st.sampled_from([*AWKWARD, *SYMBOLS, *"é漢ж.,_0(", " ", "the", "def encode(self", CODE[200:260]])
    | st.text(max_size=8)
    | st.integers(0, len(CODE)).map(lambda at: CODE[at : at + 40]),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("kind", MODELS)
@given(texts=st.lists(TEXT, max_size=4))
@example(texts=["", " ", "\n", "  \n  a", "a\n\n\n\n b"])
@example(texts=[CODE, prose(500, 3), CODE[7:]])
def test_words_give_the_ids_of_the_whole(kind: str, texts: list[str]) -> None:
    processor = model(**frozen(MODELS[kind]))
    encoder = WordEncoder.of(processor)
    assert encoder is not None
    texts = [text.replace("\u2581", "") for text in texts]
    for _ in range(2):  # At the second time, no word is new.
        found = encoder.encode(texts, 1)
        assert [ids.tolist() for ids in found] == [processor.encode(text) for text in texts]
        assert all(ids.dtype == np.int32 for ids in found)


def test_the_finer_words_are_taken_where_the_vocabulary_allows_them() -> None:
    fine, coarse = (WordEncoder.of(model(**MODELS[kind])) for kind in ("ours", "scripts together"))
    assert fine is not None and fine._rule.findall("naïve(x, 2)") == ["naïve", "(", "x", ",", " 2)"]
    assert coarse is not None and coarse._rule.findall("naïve(x, 2)") == ["naïve(x,", " 2)"]


@pytest.mark.parametrize("kind", UNFIT)
def test_other_models_encode_the_whole(kind: str) -> None:
    assert WordEncoder.of(model(**frozen(UNFIT[kind]))) is None


def test_the_comparison_sees_a_wrong_cut() -> None:
    processor = model(**frozen(UNFIT["pieces of several words"]))
    wrong = WordEncoder(processor, bpe_words._RULES[1]).encode([prose(500)], 1)
    assert wrong[0].tolist() != processor.encode(prose(500))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(train_tokenizer([prose(3000)], TokenizerConfig(type="bpe", vocab_size=400), 0))
    texts = prose(3000, 5).splitlines()
    wanted = tokenizer.encode(texts)
    monkeypatch.setattr(bpe_words, "_MAX_WORDS", 30)
    encoder = tokenizer._encoder._words  # type: ignore[union-attr]
    assert encoder is not None
    most = 0
    for text, ids in zip(texts, wanted, strict=True):
        assert tokenizer.encode([text])[0].tolist() == ids.tolist()
        most = max(most, len(encoder._numbers))
    assert most < 80
