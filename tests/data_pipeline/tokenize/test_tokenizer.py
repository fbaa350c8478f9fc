import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.building.api import build, build_tokenizer
from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest.splits import SPLITS
from data_pipeline.inspection.statistics import documents
from data_pipeline.inspection.tokenizer_report import tokenizer_report
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.tokenizer import Tokenizer, sample, train_tokenizer
from tests.corpora import corpora
from tests.data_pipeline.conftest import config, contents, prose, stream


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


@pytest.mark.parametrize(
    "symbol", ["", "</s>", "<unk>", "a\0", "<0x41>", "<extra_id_1>", "\ud83d", "\n", "a\u2581b", "漢 " * 501]
)
def test_special_pieces_cannot_be_symbols(symbol: str) -> None:
    with pytest.raises(ValueError, match="user_defined_symbols"):
        TokenizerConfig(user_defined_symbols=["\n", "a b", symbol], sentinels=2)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_every_symbol_is_one_piece_in_text(kind: str) -> None:
    symbols = ["\n", "a b", " c", "  ", "d\u2581e", '"q"', "x,y", "f\ng", "\u2585", "漢字"]
    settings = TokenizerConfig.model_validate(
        {"type": kind, "vocab_size": 500, "character_coverage": 0.999, "user_defined_symbols": symbols}
    )
    tokenizer = Tokenizer(train_tokenizer([prose(4000)], settings, 0))
    tokenizer.check_symbols(symbols, "this", trained=True)
    for symbol in symbols:
        text = symbol.replace("\u2581", " ")
        ids = tokenizer.encode([f"z{text}z"])[0].tolist()
        assert [tokenizer.decode([token]) for token in ids] == ["z", text, "z"]
    with pytest.raises(DataError, match="user_defined_symbols: 'a b c' is no piece of this"):
        tokenizer.check_symbols(["a b c"], "this", trained=True)


def test_a_tokenizer_that_never_gives_a_symbol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was trained before symbols could hold a space, and one from elsewhere."""
    (tmp_path / "a.txt").write_text(prose(3000))
    asked = {"vocab_size": 400, "character_coverage": 0.999, "user_defined_symbols": ["\n", "a b"]}
    settings = config(tmp_path / "d", tmp_path / "a.txt", tokenizer=asked)
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.tokenize.tokenizer.SPACE_MARK", " ")
        patch.setattr(Tokenizer, "check_symbols", lambda *arguments, **named: None)
        build_tokenizer(settings)
    with pytest.raises(DataError, match="user_defined_symbols: 'a b' is no piece of .*d/tokenizer"):
        build(settings)
    elsewhere = {"model": str(tmp_path / "d" / "tokenizer" / "spm.model")}
    build(config(tmp_path / "e", tmp_path / "a.txt", tokenizer=elsewhere))
    with pytest.raises(DataError, match=r"user_defined_symbols: '<mask>' is no piece of .*spm\.model"):
        build(config(tmp_path / "f", tmp_path / "a.txt", tokenizer={**elsewhere, "user_defined_symbols": ["<mask>"]}))


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
    model = train_tokenizer([prose(2000)], TokenizerConfig(vocab_size=400, character_coverage=0.99), 0)
    odd = bytearray(model)
    odd[model.index(b"<unk>")] = 0xFF
    for content in (b"junk", b"", b"\n", model[:1000], bytes(odd)):
        (tmp_path / "spm.model").write_bytes(content)
        with pytest.raises(DataError, match=r"spm.model is not a SentencePiece model") as raised:
            Tokenizer.load(tmp_path / "spm.model")
        assert "INTERNAL" not in str(raised.value)
    with pytest.raises(DataError, match=r"no tokenizer at .*gone.*duet data tokenizer"):
        Tokenizer.load(tmp_path / "gone")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_no_text_gives_a_sentinel(kind: str) -> None:
    settings = TokenizerConfig.model_validate(
        {"type": kind, "vocab_size": 500, "sentinels": 5, "character_coverage": 0.999}
    )
    tokenizer = Tokenizer(train_tokenizer([prose(4000), "<extra_id_0> 1234567"], settings, 0))
    assert [tokenizer.piece(token) for token in tokenizer.sentinel_ids] == [f"<extra_id_{n}>" for n in range(5)]
    text = "a <extra_id_0> b"
    ids = tokenizer.encode([text])[0]
    assert not set(ids.tolist()) & {*tokenizer.sentinel_ids, tokenizer.eos_id}
    if kind != "char":
        assert tokenizer.decode(ids) == text
        assert tokenizer.vocab_size == 500
    assert tokenizer.decode([*ids[:1], tokenizer.sentinel_ids[3], *ids[1:]]) == tokenizer.decode(ids)


def test_a_model_from_elsewhere_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(3000))
    model = train_tokenizer([prose(3000, 7)], TokenizerConfig(vocab_size=380, character_coverage=0.99), 3)
    (tmp_path / "old.model").write_bytes(model)
    settings = config(tmp_path / "d", tmp_path / "a.txt", tokenizer={"model": str(tmp_path / "old.model")})
    built = build(settings)
    assert (tmp_path / "d" / "tokenizer" / "spm.model").read_bytes() == model
    assert built.tokenizer.type == "old.model"
    assert built.tokenizer.vocab_size == 380
    tokens = stream(Windows.of(Dataset.open(tmp_path / "d"), "train", 50, partial=True))
    text = prose(3000).encode()[: built.splits["train"].bytes].decode()
    assert tokens.tolist() == Tokenizer(model).encode([text])[0].tolist()
    other = train_tokenizer([prose(3000, 7)], TokenizerConfig(vocab_size=381, character_coverage=0.99), 3)
    (tmp_path / "old.model").write_bytes(other)
    with pytest.raises(DataError, match=r"another dataset is at .*tokenizer\.model \(sha256\)"):
        build(settings)
    for extra, message in (
        ({"model": str(tmp_path / "gone.model")}, r"data\.tokenizer\.model=.*gone\.model cannot be read"),
        ({"model": str(tmp_path / "a.txt")}, r"a\.txt is not a SentencePiece model"),
        ({"model": "/dev/zero"}, r"data\.tokenizer\.model=/dev/zero is no file"),
        ({"model": str(tmp_path / "old.model"), "sentinels": 3}, r"old\.model has 0 pieces <extra_id_0>.*sentinels=3"),
    ):
        with pytest.raises(DataError, match=message):
            build(config(tmp_path / "e", tmp_path / "a.txt", tokenizer=extra))


def json_tokenizer(path: Path, eos: str = "<|endoftext|>") -> Path:
    """A byte-level BPE of Hugging Face's library, trained on a little text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[eos, "<extra_id_0>", "<extra_id_1>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([prose(3000)], trainer)
    made.save(str(path))
    return path


def test_a_tokenizer_of_hugging_face_builds_a_dataset(tmp_path: Path) -> None:
    file = json_tokenizer(tmp_path / "tokenizer.json")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(prose(1500, number) + "".join(AWKWARD[:10]))
    texts = [tmp_path / f"{number}.txt" for number in range(3)]
    settings = {"split": {"rule": "hash", "fraction": 0.4}, "seed": 1}
    built = build(config(tmp_path / "d", *texts, tokenizer={"model": str(file), "sentinels": 2}, **settings))
    build(config(tmp_path / "e", *texts, tokenizer={"model": str(file), "sentinels": 2}, **settings), processes=2)
    assert contents(tmp_path / "d" / "train") == contents(tmp_path / "e" / "train")
    dataset = Dataset.open(tmp_path / "d")
    dataset.verify()
    tokenizer = dataset.tokenizer()
    assert tokenizer.piece(tokenizer.eos_id) == "<|endoftext|>"
    assert built.tokenizer.unk_id == -1
    spelled = tokenizer.encode(["a <|endoftext|><extra_id_0> b"])[0]
    assert not set(spelled.tolist()) & {tokenizer.eos_id, *tokenizer.sentinel_ids}
    assert [tokenizer.piece(token) for token in built.tokenizer.sentinels] == ["<extra_id_0>", "<extra_id_1>"]
    found = [tokenizer.decode(np.concatenate(rows)) for split in SPLITS for rows in documents(dataset, split)]
    assert sorted(found) == sorted(text.read_bytes().decode() for text in texts)
    with pytest.raises(DataError, match=r"t\.json has no end-of-text piece; it must have one of </s>"):
        Tokenizer.load(json_tokenizer(tmp_path / "t.json", "[end]"))
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["!"] = 999
    (tmp_path / "gap.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"gap\.json has 400 pieces, and none of them has the id 3, "):
        build(config(tmp_path / "gap", *texts, tokenizer={"model": str(tmp_path / "gap.json")}))
    (tmp_path / "bad.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs the library tokenizers: pip install 'duet-pretrain\[tokenizers\]'"):
        Tokenizer(b'{"version": "1.0"}')


def test_the_report_is_by_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(3000))
    (tmp_path / "b.txt").write_text("漢字かな交じり文" * 3)
    sources = {name: {"paths": [str(tmp_path / f"{name}.txt")]} for name in "ab"}
    tokenizer = {"vocab_size": 400, "character_coverage": 0.99}
    found = tokenizer_report(config(tmp_path / "d", sources=sources, tokenizer=tokenizer))
    assert list(found.sources) == ["a", "b"]
    for name, report in found.sources.items():
        assert report.sample_bytes == pytest.approx(len((tmp_path / f"{name}.txt").read_bytes()) * 0.9, abs=4)
        assert report.unknown_rate == 0
        assert report.round_trip == 1
    assert found.sources["a"].bytes_per_token > 1.2
    assert found.sources["b"].bytes_per_token == 1
    assert found.sources["a"].coverage > 0.95
    assert found.sources["b"].coverage == 0
    assert not (tmp_path / "d" / "_work").exists()
