"""Exports in the hands of transformers, which takes seconds to import: where it is used, so that one process does."""

import json
import runpy
import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.tokenize.tokenizer import Tokenizer
from model.architectures.token_model import TokenModel
from model.generation.sampling import Sampling
from pretrain.export.portable import num_attentions, write_export
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.trained import find_checkpoint
from tests.model.helpers import VARIANTS, batch_of, build, open_masks, variant
from tests.runs import ROOT

LICENSE = (ROOT / "LICENSE").read_text()
PROMPTS = ["You may", "The", "A"]


def from_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def wrapped(model: TokenModel) -> Any:
    from pretrain.export.modeling_duet import DuetConfig, DuetForCausalLM

    facts = {"model": model.config.model_dump(), "objective": "causal"}
    theirs = DuetForCausalLM(DuetConfig(duet=facts, num_hidden_layers=num_attentions(model)))
    theirs.model.load_state_dict(model.state_dict())
    return theirs.to(model.token_embed.weight.dtype).eval()


def greedy(path: Path, tokens: int) -> list[str]:
    continuation = Continuation(open_trained(path), PROMPTS, Settings(Sampling(temperature=0.0), tokens))
    texts = list(PROMPTS)
    for number, piece in continuation.pieces():
        texts[number] += piece
    return texts


@torch.no_grad()
def test_transformers_loads_it_and_saves_it_again(exported: Path, tmp_path: Path) -> None:
    ours = open_trained(exported)
    ids = torch.tensor(ours.tokenizer.encode(["Licensed under "])[0].tolist())[None]
    model, _ = from_folder(exported)
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model(ids).logits, ours.model(ids))
    last = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=2).logits
    torch.testing.assert_close(last, ours.model(ids)[:, -2:])  # a product of other sizes may be summed in another order
    for part in from_folder(exported):
        part.save_pretrained(tmp_path / "again")
    with (
        safe_open(exported / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as new,
    ):
        assert old.keys() == new.keys()
    assert torch.equal(from_folder(tmp_path / "again")[0](ids).logits, ours.model(ids))
    again = open_trained(tmp_path / "again")
    assert torch.equal(again.model(ids), ours.model(ids))
    assert again.tokenizer.sha256 == ours.tokenizer.sha256


def test_bf16_stays_bf16(run: Path, tmp_path: Path) -> None:
    write_export(*find_checkpoint(run), tmp_path / "half", "bf16")
    model, _ = from_folder(tmp_path / "half")
    assert {values.dtype for values in model.state_dict().values()} == {torch.bfloat16}


def test_its_tokenizer_gives_our_tokens(exported: Path) -> None:
    _, theirs = from_folder(exported)
    ours = open_trained(exported).tokenizer
    texts = ["", "You  may not\n\n </s> use", " <unk>(c) 1.0 ", "é unknown", LICENSE[:3000]]
    for text, expected in zip(texts, ours.encode(texts), strict=True):
        assert theirs(text).input_ids == expected.tolist()
        assert theirs.decode(expected.tolist()) == ours.decode(expected)
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)


def test_so_does_an_imported_tokenizer(exported: Path, tmp_path: Path) -> None:
    """Of Hugging Face's own kind, whose own classes would put [CLS] before each text and read special tokens in it."""
    from transformers import AutoTokenizer

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["[CLS]", "</s>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([LICENSE], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    folder = shutil.copytree(exported, tmp_path / "exported")
    (folder / "spm.model").unlink()
    made.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.of(folder)
    text = "You  may not\n </s> use [CLS] licensed"
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    for tokenizer in (theirs, AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)):
        assert tokenizer(text).input_ids == ours.encode([text])[0].tolist()
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.pad_token_id == ours.eos_id == 1


def test_greedy_generation_is_ours_token_by_token(exported: Path) -> None:
    """Side by side, padded at the left: with a cache, without, and with beams, which reorder the cache."""
    model, tokenizer = from_folder(exported)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch.attention_mask.sum(1).tolist() != [batch.input_ids.shape[1]] * 3
    room = model.config.max_position_embeddings - batch.input_ids.shape[1]
    for use_cache in (True, False):
        found = model.generate(**batch, max_new_tokens=room, do_sample=False, use_cache=use_cache)
        starts = (batch.attention_mask == 0).sum(1).tolist()
        assert [tokenizer.decode(row[start:]) for row, start in zip(found, starts, strict=True)] == greedy(
            exported, room
        )
    beams = [model.generate(**batch, max_new_tokens=8, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        model.generate(**batch, max_new_tokens=30, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [*VARIANTS, "sinks", "globals", "fixed_heads", "span_sinks", "random", "routing_window"]
)
def test_caches_and_pads_change_nothing(name: str) -> None:
    """Whatever the architecture's options, in float64: texts in parts, padded at either side, all logits."""
    from transformers import DynamicCache

    model = open_masks(build(variant(name))).double().eval()
    theirs = wrapped(model)
    ids = batch_of(model.config, sequences=2).input_ids
    assert torch.equal(theirs(ids).logits, model(ids))
    kept = DynamicCache()
    parts = [theirs(part, past_key_values=kept).logits for part in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-12)
    assert len(kept) == num_attentions(model)
    assert {layer.get_seq_length() for layer in kept.layers} == {ids.shape[1]}
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 7:] = 0
    alone: list[Tensor] = [model(ids[:1, 4:]), model(ids[1:, :7])]
    for use_cache in (False, True):
        found = theirs(ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(found[:1, 4:], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1:, :7], alone[1], rtol=0, atol=1e-12)


def test_what_transformers_cannot_do_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.export.modeling_duet import DuetConfig, DuetForCausalLM

    facts = json.loads((exported / "config.json").read_text())["duet"]
    for change, message in (
        ({"model": {"architecture": "encoder_only", "vocab_size": 9}, "objective": "masked"}, "no next token to draw"),
        ({"model": {"architecture": "encoder_decoder", "vocab_size": 9}}, "not to continue a prompt"),
        ({"objective": "prefix"}, "a prompt is read both ways"),
    ):
        with pytest.raises(ConfigError, match=message):
            DuetForCausalLM(DuetConfig(duet=facts | change))
    model, _ = from_folder(exported)
    with pytest.raises(ValueError, match="attention_mask is"):
        model(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.zeros(1, 2))
    own = tmp_path / "model.py"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "model", module_from_spec(ModuleSpec("model", None, origin=str(own))))
        with pytest.raises(ImportError, match=rf"needs the package duet-pretrain.*model is {own} here, not Duet's"):
            runpy.run_path(str(exported / "modeling_duet.py"))
    monkeypatch.setitem(sys.modules, "pretrain.inference.trained", None)
    with pytest.raises(ImportError, match="needs the package duet-pretrain"):
        runpy.run_path(str(exported / "modeling_duet.py"))
