"""Datasets of texts with labels: each label is of the characters that it was given for, whatever the tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_pipeline.building.api import build
from data_pipeline.config import told_names
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.kinds import open_windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.tokenizer import JSON, Tokenizer
from pretrain.config.schema import load
from pretrain.objectives.objective import IGNORE
from tests.data_pipeline.conftest import config
from tests.data_pipeline.inspection.test_commands import duet_data
from tests.objectives import objective

CONTEXT, BYTES = 40, 257
NAMES = {"sequence": ["good", "bad"], "token": ["O", "PER", "LOC"], "span": []}
WORDS = ["Anna", "Bob", "saw", "Rome", "日本", "naïve\u2581", "</s>", "x"]


def told(kind: str, number: int) -> dict[str, Any]:
    """An object with labels; of every number it has other words."""
    rng = np.random.default_rng(number)
    words = [str(number), *rng.choice(WORDS, rng.integers(2, 12)).tolist()]
    text = " ".join(words)
    if kind == "sequence":
        return {"text": text, "label": NAMES[kind][number % 2]}
    if kind == "token" and number % 2:
        return {"text": words, "label": ["PER" if word in ("Anna", "Bob") else "O" for word in words]}
    if kind == "token":
        found = [{"start": of.start(), "end": of.end(), "label": "LOC"} for of in re.finditer("Rome|日本", text)]
        return {"text": text, "label": found}
    answer = words[1 + number % (len(words) - 1)]
    start = text.index(answer, len(words[0]) + 1)
    squad = {"answer_start": [start], "text": [answer]} if number % 2 else {"start": start, "text": answer}
    return {"text": text, "question": f"{answer} where?", "label": squad}


def labels_of(kind: str, record: dict[str, Any]) -> tuple[str, list[int]]:
    """The characters of a row, and the label of each, -1 for none; a question ends with NUL. In words of this test's
    own."""
    text, label = record["text"], record["label"]
    if kind == "sequence":
        return text, [NAMES[kind].index(label)] * len(text)
    if isinstance(text, list):
        each = [NAMES[kind].index(name) for name in label]
        pieces = [[label] * len(word) + [-1] for word, label in zip(text, each, strict=True)]
        return " ".join(text), [number for piece in pieces for number in piece][:-1]
    found = [0] * len(text)
    if kind == "token":
        for of in label:
            found[of["start"] : of["end"]] = [NAMES[kind].index(of["label"])] * (of["end"] - of["start"])
        return text, found
    start, answer = (
        value[0] if isinstance(value, list) else value
        for value in (label.get("start", label.get("answer_start")), label["text"])
    )
    found[start : start + len(answer)] = [1] * len(answer)
    return f"{record['question']}\0{text}", [-1] * (len(record["question"]) + 1) + found


def built(folder: Path, kind: str, tokenizer: dict[str, Any], **more: Any) -> Dataset:
    lines = [json.dumps(told(kind, number)) for number in range(120)]
    (folder / "told.jsonl").write_text("\n".join([*lines, json.dumps({"text": "no", "question": "", "label": None})]))
    labels = {"kind": kind, "names": NAMES[kind]}
    sources = {"told": {"paths": [str(folder / "told.jsonl")]}}
    settings = {
        "sources": sources,
        "tokenizer": tokenizer,
        "split": {"rule": "hash", "fraction": 0.1},
        "labels": labels,
    }
    build(config(folder / "dataset", shard_tokens=1024, shuffle=True, **settings | more))
    return Dataset.open(folder / "dataset")


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with bytes for tokens, as GPT-2's has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({piece: number for number, piece in enumerate(["</s>", *alphabet])}, []))
    fast.normalizer = normalizers.Replace("#", "")
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    file = tmp_path_factory.mktemp("bytes") / JSON
    fast.save(str(file))
    return file


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("of", ["char", "unigram", "json"])
def test_a_label_is_of_the_characters_it_was_given_for(
    kind: str, of: str, bytewise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a text is tokenized once, to the ids that it has anywhere."""
    encode, texts = Tokenizer.encode, list[str]()

    def seen(self: Tokenizer, given: list[str], *more: Any) -> list[np.ndarray]:
        texts.extend(given)
        return encode(self, given, *more)

    tokenizers: dict[str, dict[str, Any]] = {
        "char": {"type": "char", "vocab_size": 80, "user_defined_symbols": ["\n", *"</>"]},
        "unigram": {"vocab_size": 288, "character_coverage": 0.99},
        "json": {"model": str(bytewise)},
    }
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", seen)
        dataset = built(tmp_path, kind, tokenizers[of])
    known = {labels_of(kind, told(kind, number))[0]: told(kind, number) for number in range(120)}
    sides: list[Split] = ["train", "validation"]
    counts = [_compared(dataset, kind, split, known) for split in sides]
    assert sum(counts) == 120
    known_texts = {text.rpartition("\0")[2] for text in known}
    assert sum(text in known_texts for text in texts) == (120 if kind == "sequence" else 0)
    for text in known_texts:
        [ids] = encode(dataset.tokenizer(), [text])
        assert np.array_equal(dataset.tokenizer().encode_with_offsets(text)[0], ids)
    assert dataset.manifest.splits["train"].documents == counts[0]
    assert [source.dropped for source in dataset.manifest.sources] == [{"empty": 1}]


@pytest.mark.parametrize("kind", NAMES)
def test_a_text_of_which_a_tokenizer_leaves_nothing_has_no_label(kind: str, bytewise: Path, tmp_path: Path) -> None:
    label: Any = {"start": 0, "end": 1, "label": "PER", "text": "#"}
    label = {"sequence": "bad", "token": [label], "span": label}[kind]
    file = tmp_path / "told.jsonl"
    objects = [told(kind, 0), {"text": "#", "question": "#", "label": label}, told(kind, 2)]
    file.write_text("\n".join(map(json.dumps, objects)))
    sources, names = {"told": {"paths": [str(file)]}}, {"kind": kind, "names": NAMES[kind]}
    given = {"rule": "given", "files": [str(file)]}
    tokenizer = {"model": str(bytewise)}
    build(config(tmp_path / "dataset", sources=sources, labels=names, split=given, tokenizer=tokenizer))
    dataset = Dataset.open(tmp_path / "dataset")
    windows = open_windows(dataset, "labels", "train", CONTEXT)
    assert len(windows) == dataset.manifest.splits["train"].documents == 3
    texts, labels = np.split(windows.read(np.arange(3)), 2, axis=1)
    assert set(texts[1].tolist()) == {-1, dataset.tokenizer().eos_id}
    assert (labels[1] == -1).all()
    assert (labels[[0, 2]] >= 0).any(axis=1).all()


def _compared(dataset: Dataset, kind: str, split: Split, known: dict[str, dict[str, Any]]) -> int:
    """Rows of a split, each compared with the object that it is of."""
    windows, tokenizer = open_windows(dataset, "labels", split, CONTEXT), dataset.tokenizer()
    made = objective("labels", CONTEXT, label_kind=kind, labels=tuple(NAMES[kind]))
    every = np.arange(len(windows))
    arrays = made.arrays(windows.read(every), every, None, 0)
    assert (arrays["segment_ids"] == -arrays["padding"].astype(int)).all()
    for row, ids, labels, padding in zip(every, *(arrays[n] for n in ("input_ids", "labels", "padding")), strict=True):
        [(_, whole)] = windows.origin(int(row)).documents
        ids, cut = ids[~padding], len(whole) > CONTEXT
        assert ids.tolist() == whole[:CONTEXT].tolist()
        ends = [*np.flatnonzero(whole == tokenizer.eos_id), len(whole)]
        parts = [whole[begin:end] for begin, end in zip([0, ends[0] + 1], ends, strict=False)]
        spelled = "\0".join(tokenizer.decode(part) for part in parts)
        found, expected = labels_of(kind, known[spelled.replace(" \u2047 ", "\u2581")])
        each = [_label(characters, expected) for characters in _characters(tokenizer, found)]
        if kind == "sequence":
            assert labels.tolist() == [expected[0]]
        elif kind == "token":
            assert labels[: len(ids)].tolist() == each[:CONTEXT]
            assert (labels[len(ids) :] == IGNORE).all()
        else:
            within = [place for place, label in enumerate(each) if label == 1]
            assert labels.tolist() == ([IGNORE] * 2 if cut and within[-1] >= CONTEXT - 1 else [within[0], within[-1]])
    return len(windows)


def _characters(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Of each token those that it has a part in: bytes are counted, since tokens are stretches of them."""
    places = [place for place, character in enumerate(text) for _ in character.encode()]
    of_bytes, found, at = tokenizer.vocab_size == BYTES, list[list[int]](), 0
    for number, part in enumerate(text.split("\0")):
        sizes = [1] if number else []  # what ends a question
        for token in tokenizer.encode([part])[0].tolist():
            if of_bytes or tokenizer.is_byte(token):
                sizes.append(1)
            else:  # U+2581 is all that a tokenizer does not know here
                spelled = "\u2581" if token == tokenizer.unk_id else tokenizer.piece(token).replace("\u2581", " ")
                sizes.append(len(spelled.encode()))
        for size in sizes:
            found.append(sorted({*places[at : at + size]}))
            at += size
    assert at == len(places)
    return found


def _label(characters: list[int], labels: list[int]) -> int:
    """Of a token: that of the first of its characters which has one that is told, else that of all."""
    told = [labels[place] for place in characters]
    marked = [label for label in told if label > 0] or [label for label in told if label >= 0]
    return marked[0] if marked else IGNORE


def test_of_many_names_a_message_has_the_first() -> None:
    assert told_names(["a", "b"]) == "a, b"
    assert told_names([*"abc"], most=2) == "a, b and 1 more"


BAD = {
    "no label": ("sequence", {"text": "a"}, "line 2 has no key 'label'; its keys: 'text'. Set label_key"),
    "unknown": (
        "sequence",
        {"text": "a", "label": "ugly"},
        "'ugly' under 'label' is none of data.labels.names: good, ",
    ),
    "no name": ("sequence", {"text": "a", "label": True}, "line 2: True under 'label' is none of"),
    "too few": ("token", {"text": ["a", "b"], "label": ["O"]}, "line 2: 2 words, and 1 labels under 'label'"),
    "no word": ("token", {"text": ["a", ""], "label": ["O", "O"]}, "line 2: 'text' is a list of words, and not all"),
    "no list": ("token", {"text": "a b", "label": "O"}, "line 2: 'label' is a str, and not a list of stretches"),
    "beyond": ("token", {"text": "a", "label": [{"start": 0, "end": 2, "label": "O"}]}, "the text, which has 1, and"),
    "overlap": (
        "token",
        {"text": "abc", "label": [{"start": 0, "end": 2, "label": "O"}, {"start": 1, "end": 3, "label": "PER"}]},
        "line 2: two stretches under 'label' overlap at character 1",
    ),
    "elsewhere": (
        "span",
        {"text": "abc", "question": "q", "label": {"start": 1, "text": "ab"}},
        "line 2: the answer is 'ab', and at character 1 of 'text' stands 'bc'",
    ),
    "no answer": ("span", {"text": "abc", "question": "q", "label": {"answer_start": [], "text": []}}, "null leaves"),
    "no question": ("span", {"text": "abc", "question": "", "label": {"start": 0, "text": "a"}}, "holds no question"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_says_no_label_is_named(name: str, tmp_path: Path) -> None:
    kind, record, message = BAD[name]
    (tmp_path / "told.jsonl").write_text(f"{json.dumps(told(kind, 1))}\n{json.dumps(record)}\n")
    sources = {"told": {"paths": [str(tmp_path / "told.jsonl")]}}
    labels = {"kind": kind, "names": NAMES[kind]}
    with pytest.raises(DataError, match=re.escape(message)):
        build(config(tmp_path / "out", sources=sources, labels=labels, split={"rule": "hash"}))


def test_labels_are_part_of_what_a_dataset_is(tmp_path: Path) -> None:
    small = {"type": "char", "vocab_size": 80}
    dataset = built(tmp_path, "sequence", small)
    assert dataset.manifest.labels is not None
    assert dataset.manifest.labels.names == ["good", "bad"]
    turned = {"kind": "sequence", "names": ["bad", "good"]}
    (tmp_path / "again").mkdir()
    assert (
        built(tmp_path / "again", "sequence", small, labels=turned).manifest.fingerprint != dataset.manifest.fingerprint
    )
    seen = duet_data("inspect", str(tmp_path / "dataset"), "--samples", "1")
    assert "texts with labels, sequence: good, bad" in seen
    assert re.search(r"⟶ (good|bad)", seen)
    with pytest.raises(DataError, match="texts with labels, which data.objective=causal is not for"):
        objective().check(dataset)


def test_what_labels_do_not_go_with_is_said() -> None:
    def refused(message: str, *args: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load(list(args))

    encoder = "model.architecture=encoder_only"
    refused("labels are said by an encoder that reads a text both ways", "model.head.kind=token")
    refused("need a head", encoder, "data.objective=labels")
    refused("need a head", encoder, "data.objective=masked", "model.head.kind=token")
    refused("does not fit model.architecture=parallel", "data.objective=labels")
    refused("head.labels are of head.kind=sequence or token", encoder, "model.head.labels=[a,b]")
    refused("over a table of labels", encoder, "model.head.kind=span", "data.objective=labels", "model.z_loss=1")
    refused("two at least", "data.labels.kind=token", "data.labels.names=[a]")
    refused("there twice", "data.labels.kind=token", "data.labels.names=[a,a]")
    refused("quote names such as yes", "data.labels.kind=token", "data.labels.names=[yes,no]")
    refused("there are none", "data.labels.names=[a,b]")
    refused("cuts within a text", "data.labels.kind=span", "data.split.rule=tail")
    refused("for copies; take exact", "data.labels.kind=span", "data.duplicates.rule=near")
    refused("and not of pairs", "data.labels.kind=span", "data.sources.a={paths: [x], target_key: y}")
    assert load(["data.labels.kind=token", "data.labels.names=[0,01]"]).data.labels.names == ["0", "01"]
