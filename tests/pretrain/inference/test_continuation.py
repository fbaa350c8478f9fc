"""What is told of a generated text: the numbers are the model's, the pieces are the text, the page stays small."""

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import ConfigError
from data_pipeline.tokenize.tokenizer import Tokenizer, train_tokenizer
from launch.commands.generate import changed
from model.generation.inspection import attention_heads, inspect
from model.generation.sampling import Sampling
from pretrain.inference.attention_rows import AttentionRows
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.text_page import TOKENS, prepare, records, write_page
from pretrain.inference.trained import Trained
from tests.model.generation.two_at_once import make_two_at_once
from tests.model.helpers import build, open_masks, small

SAMPLED = Sampling(repetition_penalty=1.3, temperature=0.7, top_k=20, top_p=0.95)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Characters that it does not know are spelt in bytes."""
    return Tokenizer(train_tokenizer(["the cat sat on the mat\n" * 40], TokenizerConfig(type="bpe", vocab_size=290), 0))


def trained(tokenizer: Tokenizer, **changes: Any) -> Trained:
    model = open_masks(build(small(vocab_size=tokenizer.vocab_size, **changes))).double().eval()
    return Trained(model, tokenizer, "causal", "small", 7)


def told(which: Trained, prompts: list[str], settings: Settings, *, attention: bool = False) -> list[dict[str, Any]]:
    continuation = Continuation(which, prompts, settings, recorded=True)
    shown = list(prompts)
    for number, piece in continuation.pieces():
        shown[number] += piece
    found = records(which, continuation, attention=attention)
    assert [one["prompt"] + one["text"] for one in found] == shown
    assert json.loads(json.dumps(found, allow_nan=False)) == found, "strict JSON"
    return found


def logits_before(which: Trained, ids: list[int], at: int) -> Tensor:
    """Those that token `at` was drawn from, from a pass of their own: [V]."""
    with torch.no_grad():
        return which.model(torch.tensor([ids[max(0, at - which.model.config.context) : at]]))[0, -1]


def test_a_word_keeps_the_space_before_it() -> None:
    """Also the first one, of a tokenizer that puts a space before each text and takes it away again."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 40),
        model_writer=file,
        model_type="bpe",
        vocab_size=20,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
    )
    tokenizer = Tokenizer(file.getvalue())
    for one in told(trained(tokenizer), ["the", "cat sat"], Settings(SAMPLED, tokens=12, seed=2)):
        ids = [token["id"] for token in one["tokens"]]
        assert one["prompt"] + one["text"] == tokenizer.decode(ids)
        assert "".join(token["text"] for token in one["tokens"]) == tokenizer.decode(ids)
        first = next(token for token in one["tokens"] if not token["prompt"])
        assert first["piece"] == "<unk>" or first["piece"].replace("\u2581", " ") == first["text"]


@pytest.mark.parametrize(
    ("text", "told"), [("a\udcff", "the byte 0xff, which is not UTF-8"), ("\ud83d", "half a surr")]
)
def test_text_that_no_utf8_can_hold_is_refused(tokenizer: Tokenizer, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"a prompt holds {told}"):
        Continuation(trained(tokenizer), ["the", text], Settings(SAMPLED))
    with pytest.raises(ConfigError, match=f"a stop string holds {told}"):
        Continuation(trained(tokenizer), ["the"], Settings(SAMPLED, stops=(text,)))


def test_probabilities_are_the_models_through_the_moving_window(tokenizer: Tokenizer) -> None:
    which = trained(tokenizer)
    found = told(which, ["the cat €", ""], Settings(SAMPLED, tokens=20, seed=3))
    for one in found:
        ids = [token["id"] for token in one["tokens"]]
        prompt = sum(token["prompt"] for token in one["tokens"])
        assert one["inspected_from"] == max(0, len(ids) - which.model.config.context) > 0
        for at, token in enumerate(one["tokens"]):
            if token["prompt"]:
                # The window that was read has moved past the start of the text.
                assert (token["log_probability"] is None) == (at <= one["inspected_from"])
                assert token["sampling_log_probability"] is None
                continue
            logits = logits_before(which, ids, at)
            expected = logits.float().log_softmax(-1)
            assert token["log_probability"] == pytest.approx(expected[token["id"]].item(), abs=2e-6)
            assert token["rank"] == (expected > expected[token["id"]]).sum() + 1
            assert [other["id"] for other in token["likeliest"]] == expected.topk(5).indices.tolist()
            present = torch.zeros(1, len(logits), dtype=torch.bool)
            present[0, ids[:at]] = True
            drawn_from = SAMPLED.probabilities(logits[None], present)[0, token["id"]].item()
            assert token["sampling_log_probability"] == pytest.approx(math.log(drawn_from), abs=2e-6)
        assert prompt == max(1, len(tokenizer.encode([one["prompt"]])[0]))
    assert [one["sampling"]["seed"] for one in found] == [3, 4]
    assert found[0]["model"] == {
        "run": "small",
        "step": 7,
        "architecture": "parallel_encoder_decoder",
        "context": 12,
    }


def test_a_long_prompt_is_scored_whole_and_its_pieces_are_the_text(tokenizer: Tokenizer) -> None:
    which = trained(tokenizer, context=300)
    prompt = "the cat sät on €, " * 20
    [one] = told(which, [prompt], Settings(Sampling(temperature=0.0), tokens=4))
    ids = [token["id"] for token in one["tokens"]]
    assert len(ids) > 150
    assert "".join(token["text"] for token in one["tokens"] if token["prompt"]) == prompt
    assert "".join(token["text"] for token in one["tokens"] if not token["prompt"]) == one["text"]
    with torch.no_grad():
        expected = which.model(torch.tensor([ids]))[0].float().log_softmax(-1)
    scores = [token["log_probability"] for token in one["tokens"]]
    assert scores[0] is None
    assert scores[1:] == pytest.approx([expected[at - 1, ids[at]].item() for at in range(1, len(ids))], abs=2e-6)
    assert all(token["sampling_log_probability"] == 0 for token in one["tokens"] if not token["prompt"])
    assert one["density"].keys() == {f"{site}/{layer:02d}" for site in ("enc_ff", "dec_ff") for layer in range(2)}
    seen = inspect(which.model, torch.tensor(ids))
    for mask, density in one["density"].items():
        assert density == pytest.approx(seen.density[mask].tolist(), abs=1e-6)


@pytest.mark.parametrize("two_at_once", [False, True])
def test_a_text_says_why_it_ended(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, two_at_once: bool) -> None:
    which = trained(tokenizer)
    if two_at_once:
        make_two_at_once(which.model.config, monkeypatch)
    greedy = Settings(Sampling(temperature=0.0), tokens=9)
    [one] = told(which, ["the"], greedy)
    assert (one["finish"], len(one["tokens"])) == ("length", 9 + sum(token["prompt"] for token in one["tokens"]))
    drawn = [token for token in one["tokens"] if not token["prompt"]]
    stop = next(token["text"] for token in drawn[2:] if token["text"].strip())
    [stopped] = told(which, ["the"], replace(greedy, stops=(stop,)))
    assert stopped["finish"] == "stop"
    assert stopped["text"] == one["text"][: one["text"].index(stop)]
    ids = [token["id"] for token in drawn]
    before = next(place for place in (1, 3, 5, 7) if ids.index(ids[place]) == place)
    monkeypatch.setattr(tokenizer, "eos_id", ids[before])
    [ended] = told(which, ["the"], greedy)
    assert ended["finish"] == "end"
    [short] = told(which, ["the"], replace(greedy, tokens=before))
    assert short["finish"] == "length", "a step that goes beyond what was asked for says nothing of it"
    assert [token["id"] for token in ended["tokens"] if not token["prompt"]] == [t["id"] for t in drawn[:before]]


def test_without_gates_there_is_no_density(tokenizer: Tokenizer) -> None:
    off = {"architecture": "decoder_only", "learned_dropout": {"enabled": False}}
    [one] = told(trained(tokenizer, **off), ["the"], Settings(SAMPLED, tokens=3), attention=True)
    assert one["density"] == {}
    assert list(one["attention"]["maps"]) == ["dec_sa/00", "dec_sa/01"]


def unpacked(packed: dict[str, Any], name: str, length: int) -> Tensor:
    """Weights [H, T - first, T], 0 where nothing is kept."""
    flat = torch.tensor(list(base64.b64decode(packed["maps"][name]["rows"])), dtype=torch.float32)
    flat = flat.view(packed["maps"][name]["heads"], -1)
    rows = torch.zeros(len(flat), length - packed["first"], length)
    start = 0
    for row in range(packed["first"], length):
        rows[:, row - packed["first"], : row + 1] = (flat[:, start : start + row + 1] / 255) ** 2
        start += row + 1
    assert start == flat.shape[1]
    return rows


@pytest.mark.parametrize("limit", [10**6, 16 * 78 - 1, 6 * 78, 6 * 78 - 1, 100, 0])
def test_attention_keeps_to_its_bytes(tokenizer: Tokenizer, limit: int) -> None:
    """Two layers: self attention in each stream with 2 heads, cross attention with 4; 78 weights of 12 tokens."""
    which = trained(tokenizer)
    exact: dict[str, Tensor] = {}
    rows = AttentionRows(attention_heads(which.model), 12, limit)

    def look(name: str, weights: Tensor) -> None:
        exact[name] = weights.float()
        rows.add(name, weights)

    inspect(which.model, torch.arange(12), look)
    packed = rows.packed()
    assert sum(len(base64.b64decode(one["rows"])) for one in packed["maps"].values()) <= limit
    assert packed["heads_apart"] == (limit > 16 * 78)
    assert packed["first"] == {10**6: 0, 16 * 78 - 1: 0, 6 * 78: 0, 6 * 78 - 1: 1, 100: 11, 0: 12}[limit]
    for name, weights in exact.items():
        expected = weights if packed["heads_apart"] else weights.mean(0, keepdim=True)
        found = unpacked(packed, name, 12)
        torch.testing.assert_close(found.sqrt(), expected[:, packed["first"] :].sqrt(), rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_page_is_refused_before_anything_is_computed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    which = trained(tokenizer)
    long = Continuation(which, ["the"] * 2, Settings(SAMPLED, tokens=TOKENS // 2))
    with pytest.raises(
        ConfigError, match=r"a page has room for 10,000 tokens, these texts may be 10,00\d; take --json"
    ):
        prepare(tmp_path / "page.html", long)
    short = Continuation(which, ["the"], Settings(SAMPLED))
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        prepare(tmp_path, short)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a file stands where a folder is needed"):
        prepare(tmp_path / "file" / "page.html", short)
    prepare(tmp_path / "new" / "page.html", short)
    assert (tmp_path / "new").is_dir()


def test_a_text_cannot_leave_the_element_that_holds_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = '</script><b>&\u2028"__DATA__'
    found = told(trained(tokenizer), [prompt], Settings(SAMPLED, tokens=1), attention=True)
    write_page(tmp_path / "page.html", found)
    page = (tmp_path / "page.html").read_text()
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == found
    assert page.count("</script>") == 2


def test_set_changes_one_option() -> None:
    settings = Settings(SAMPLED)
    assert changed(settings, []) == settings
    assert changed(settings, ["temperature", "0.5"]) == replace(settings, sampling=replace(SAMPLED, temperature=0.5))
    assert changed(settings, ["top-k", "0"]).sampling.top_k is None
    assert changed(settings, ["tokens", "3"]) == replace(settings, tokens=3)
    for words, message in (
        (["temperature"], "takes a name and a value; names are repetition_penalty, temperature"),
        (["heat", "3"], "takes a name and a value"),
        (["top_k", "1.5"], "top_k=1.5; it is a whole number"),
        (["top_p", "2"], "top_p=2.0; it is a probability"),
        (["tokens", "0"], "tokens=0; it is 1 or more"),
        (["seed", "-1"], "seed=-1; it is 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(settings, words)
