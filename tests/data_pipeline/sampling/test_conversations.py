"""Datasets of conversations: labels are the assistant's tokens and no others, whatever the texts spell."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig, TokenizerConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.readers import Message
from data_pipeline.ingest.splits import Split
from data_pipeline.sampling.kinds import open_windows
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.sampling.sample_plan import told_cut, wanted_phase
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.chat_template import ChatTemplate
from data_pipeline.tokenize.tokenizer import Tokenizer, train_tokenizer
from pretrain.config.schema import load
from pretrain.export.hugging_face.chat import chat_settings
from pretrain.objectives.objective import IGNORE
from tests.data_pipeline.conftest import config
from tests.data_pipeline.inspection.test_commands import duet_data
from tests.objectives import objective

CONTEXT = 64
CHAT = {"messages_key": "turns"}
Told = list[dict[str, str]]


def conversations(count: int) -> list[Told]:
    """Of every number they have their own words; they spell what would end a turn, and some say nothing or a lot."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        words = ["".join(rng.choice(list("abcd \n"), rng.integers(0, 12))) for _ in range(5)]
        told = [{"role": "system", "content": words[0]}] if number % 3 else []
        told += [{"role": "user", "content": f"{number}</s>assistant\n{words[1]}"}]
        told += [{"role": "assistant", "content": f"{words[2]}</s>" * (number % 4)}]
        if number % 5 == 0:
            told += [{"role": "user", "content": words[3] * 3}, {"role": "assistant", "content": words[4] * 3}]
        found.append(told)
    return found


def rendered(told: Told, eos: str = "\0") -> list[tuple[str, bool]]:
    """Characters, and whether each is to be written: by the default template, in words of this test's own."""
    found = []
    for message in told:
        writes = message["role"] == "assistant"
        found += [(c, False) for c in message["role"] + "\n"]
        found += [(c, writes) for c in message["content"]]
        found.append((eos, writes))
    return found


def fitting(characters: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """What a window has of a conversation: all, or as much as ends with an end of the assistant's within it."""
    if len(characters) <= CONTEXT + 1:
        return characters
    ends = [place + 1 for place, told in enumerate(characters[: CONTEXT + 1]) if told == ("\0", True)]
    return characters[: max(ends, default=0)]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Conversations, questions with answers, and plain text, of which none is held out but the first's."""
    folder = tmp_path_factory.mktemp("talk")
    lines = [json.dumps({"turns": told, "id": number}) for number, told in enumerate(conversations(300))]
    (folder / "talk.jsonl").write_text("\n".join([*lines, json.dumps({"turns": None}), json.dumps({"turns": []})]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"q": f"q{n}", "a": f"a{n}"}) + "\n" for n in range(60)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": "ab" * (2 + n)}) + "\n" for n in range(40)))
    build(
        config(
            folder / "dataset",
            sources={
                "talk": {"paths": [str(folder / "talk.jsonl")], **CHAT},
                "pairs": {"paths": [str(folder / "pairs.jsonl")], "text_key": "q", "target_key": "a"},
                "text": {"paths": [str(folder / "text.jsonl")]},
            },
            tokenizer={"type": "char", "vocab_size": 80, "user_defined_symbols": ["\n", *"abcdemnrstuiyq</>"]},
            split={"rule": "hash", "fraction": 0.1},
            shard_tokens=1024,
            shuffle=True,
        )
    )
    dataset = Dataset.open(folder / "dataset")
    prepare(dataset, CONTEXT)
    return dataset


def read(dataset: Dataset, split: Split, source: str | None) -> list[list[tuple[str, bool]]]:
    """Each document of an epoch as a model is shown it: characters, and whether each is a label."""
    windows, tokenizer = open_windows(dataset, "best_fit", split, CONTEXT, source), dataset.tokenizer()
    made = objective("conversations", CONTEXT, tokenizer, packed=True, document_mask=True)
    every = np.arange(len(windows))
    batches, offsets = windows.places(every)
    starts = windows.document_starts(batches.tolist(), offsets.tolist(), range(len(every)))
    arrays, found = made.arrays(windows.read(every), every, starts, 0), []

    def spelled(ids: np.ndarray) -> list[str]:
        return ["\0" if token == tokenizer.eos_id else tokenizer.decode([token]) for token in ids.tolist()]

    for ids, labels, segments, padding in zip(
        *(arrays[name] for name in ("input_ids", "labels", "segment_ids", "padding")), strict=True
    ):
        counts = labels != IGNORE
        for segment in np.unique(segments[~padding]):
            inside = np.flatnonzero(segments == segment)
            last = inside[-1]
            assert (labels[inside[:-1]] == ids[inside[1:]])[counts[inside[:-1]]].all()
            # The last token of a full window is a label only.
            more = [(spelled(labels[last : last + 1])[0], True)] if counts[last] else []
            found.append([*zip(spelled(ids[inside]), [False, *counts[inside[:-1]].tolist()], strict=True), *more])
    return found


def test_labels_are_what_the_assistant_says(talk: Dataset) -> None:
    """By another way of writing them: each conversation is there once an epoch, whole or cut behind a turn."""
    whole = [rendered(told) for told in conversations(300)]
    expected = Counter(tuple(kept) for told in whole if (kept := fitting(told)))
    train, held_out = read(talk, "train", "talk"), read(talk, "validation", None)
    found = Counter(map(tuple, train)) + Counter(tuple(told) for told in held_out if tuple(told) in expected)
    assert found == expected
    facts = talk.manifest.sources[0]
    assert 10 < len(train) < facts.split_documents["train"]
    assert facts.dropped == {"empty": 2}
    lines = list(told_cut(talk, wanted_phase(talk, DataConfig(packing="best_fit"), CONTEXT)))
    assert lines[0].startswith("talk: ")
    assert f"{facts.split_documents['train'] - len(train)} without one are left out" in lines[0]
    ended = {tuple(fitting(told)) for told in whole if len(told) > CONTEXT + 1}
    packed = PackedWindows.of(talk, "train", CONTEXT, "talk").facts
    assert packed.cut == sum(tuple(told) in ended for told in train) > 0


def test_pairs_are_answers_and_plain_text_is_written_whole(talk: Dataset) -> None:
    asked = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(60)]
    assert {tuple(told) for told in read(talk, "train", "pairs")} <= {tuple(rendered(told)) for told in asked}
    for told in read(talk, "train", "text"):
        characters, labels = zip(*told, strict=True)
        assert set(characters) <= set("ab\0")
        assert labels == (False,) + (True,) * (len(labels) - 1)
    shown = duet_data("inspect", talk.name, "--samples", "1")
    assert "conversations, each message as '{role}\\n{content}{eos}'" in shown
    assert "all hashes match" in duet_data("verify", talk.name)


def test_a_template_is_written_by_pieces_that_no_text_gives() -> None:
    model = train_tokenizer(["user assistant system ok\n" * 50], TokenizerConfig(vocab_size=275, sentinels=2), 0)
    tokenizer = Tokenizer(model)
    template = ChatTemplate("<extra_id_0>{role}\n{content}<extra_id_1>\n", tokenizer)
    start, end = tokenizer.sentinel_ids
    ids = template.prompt([Message("user", "<extra_id_1>\n<extra_id_0>system\nok")]).tolist()
    assert [token for token in ids if token in (start, end)] == [start, end, start]
    assert template.end_id == end
    text = tokenizer.encode(["ok"])[0]
    assert tokenizer.decode(ids).startswith("user\n<extra_id_1>\n<extra_id_0>system\nok\nassistant\n")
    for wrong, why in (("{role}\n{content}\n", "no piece that no text gives"), ("{role}{content} </s>", "no piece")):
        with pytest.raises(DataError, match=why):
            ChatTemplate(wrong, tokenizer)
    assert len(template.framed(text, None, True)) == len(text) + 1


def test_a_template_of_a_tokenizer_from_elsewhere() -> None:
    """ChatML: transformers' tokenizer gives the same tokens, unless a template's text runs into the content."""
    fast = Fast(models.BPE({piece: number for number, piece in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    content = fast.to_str().encode()
    tokenizer = Tokenizer(content)
    texts = ["be kind", 'say "it\\\'s"\n', "fine"] * 9
    given = "<|im_start|>{role}\n{content}<|im_end|>\n"
    made = ChatTemplate(given, tokenizer)
    assert made.end_id == fast.token_to_id("<|im_end|>") != tokenizer.eos_id
    assert made.prompt([Message("user", "<|im_end|>")]).tolist().count(made.end_id) == 1
    settings = chat_settings(given, tokenizer, content, texts).settings
    assert "<|im_start|>" in settings["chat_template"]
    joined = "a\nbe kind" * 50  # all held-out text: nothing of it ends with end-of-text
    assert chat_settings(given, tokenizer, content, [joined]).settings == settings
    assert not chat_settings(given, tokenizer, content, ["<|im_end|>"]).settings
    cut = {**json.loads(content), "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    other = json.dumps(cut).encode()
    assert not chat_settings(given, Tokenizer(other), other, texts).settings
    assert not chat_settings(given, Tokenizer(other), other, texts[1:2]).settings


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([{"role": "user", "content": "a"}], "line 2: no message of 'turns' is the assistant's"),
        ([{"role": "bot", "content": "a"}], "line 2: message 1 of 'turns' is {'role': 'bot'"),
        ([{"role": "assistant", "content": None}], "line 2: message 1"),
        ("hello", "line 2: 'turns' is a str, not a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, turns: Any, why: str) -> None:
    good = {"turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps(line) for line in (good, {"turns": turns})))
    sources = {"talk": {"paths": [str(tmp_path / "talk.jsonl")], **CHAT}}
    with pytest.raises(DataError, match=why):
        build(config(tmp_path / "dataset", sources=sources, split={"rule": "hash", "fraction": 0.5}))


def test_what_does_not_go_with_conversations_is_refused(talk: Dataset) -> None:
    def refused(*args: str) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            duet_data(
                "plan", f"data.path={talk.name}", "model/tiny", f"model.context={CONTEXT}", "batch.tokens=640", *args
            )
        return str(caught.value)

    assert "data.packing=best_fit" in refused("data.objective=conversations")
    assert "take data.objective=conversations" in refused()
    with pytest.raises(ConfigError, match="tail cuts"):
        load(["data.sources.a.paths=[a]", "data.sources.a.messages_key=m", "data.split.rule=tail"])
    for template in ("{content}", "{role}{content}{eos}{role}"):
        with pytest.raises(ConfigError, match="chat_template"):
            load([f"data.chat_template='{template}'"])
