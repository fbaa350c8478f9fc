"""Exports in the hands of transformers, which takes seconds to import: where it is used, so that one process does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize.fast_tokenizer import fast_tokenizer
from data_pipeline.tokenize.tokenizer import JSON, Tokenizer, train_tokenizer
from model.architectures.token_model import TokenModel
from model.attention.linformer import Linformer
from model.attention.visibility import CAUSAL
from model.generation.generate import Generation
from model.generation.sampling import Sampling
from pretrain.export.hugging_face.folder import hugging_face_config, kind_of
from pretrain.export.hugging_face.sources import ENTRY, TOKENIZATION, sources
from pretrain.export.portable import write_export
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.trained import find_checkpoint
from tests.model.helpers import EVERY, VARIANTS, VOCABULARY, batch_of, build, open_masks, small, variant
from tests.runs import ROOT

LICENSE = (ROOT / "LICENSE").read_text()
PROMPTS = ["You may", "The", "A"]


def from_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def wrapped(model: TokenModel, objective: str = "causal") -> Any:
    from pretrain.export.hugging_face import modeling_duet

    about = hugging_face_config(model.config, objective, "float32", 1)
    config = modeling_duet.DuetConfig(**about, duet={"model": model.config.model_dump()})
    theirs = getattr(modeling_duet, kind_of(model.config, objective).name)(config)
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
    text = LICENSE[:200]
    assert again.tokenizer.encode([text])[0].tolist() == ours.tokenizer.encode([text])[0].tolist()


def test_bf16_stays_bf16(run: Path, tmp_path: Path) -> None:
    write_export(*find_checkpoint(run), tmp_path / "half", "bf16")
    model, _ = from_folder(tmp_path / "half")
    assert {values.dtype for values in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_its_tokenizer_gives_our_tokens(exported: Path, tmp_path: Path, kind: str) -> None:
    """By a tokenizer.json, and where none would do, by sentencepiece."""
    folder = exported
    assert (folder / JSON).is_file()
    if kind == "slow":
        folder = shutil.copytree(exported, tmp_path / "slow")
        (folder / JSON).unlink()
        for name, text in sources(open_trained(exported).model.config, (ENTRY, TOKENIZATION)).files.items():
            (folder / name).write_text(text)
        names = {"auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.DuetTokenizer", None]}}
        about = json.loads((exported / "tokenizer_config.json").read_text()) | {"tokenizer_class": "DuetTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about | names))
    _, theirs = from_folder(folder)
    theirs.save_pretrained(tmp_path / "again")
    from transformers import AutoTokenizer

    ours = open_trained(exported).tokenizer
    texts = ["", "You  may not\n\n </s> use", " <unk>(c) 1.0 ", "é unknown", LICENSE[:3000]]
    for tokenizer in (theirs, AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)):
        for text, expected in zip(texts, ours.encode(texts), strict=True):
            assert tokenizer(text).input_ids == expected.tolist()
            if ours.unk_id not in expected:
                assert tokenizer.decode(expected.tolist()) == ours.decode(expected)
        assert (tokenizer.eos_token_id, len(tokenizer)) == (ours.eos_id, ours.vocab_size)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_a_tokenizer_json_gives_the_ids_of_sentencepiece_or_is_not_made(kind: Any) -> None:
    config = TokenizerConfig(type=kind, vocab_size=500, user_defined_symbols=["<mask>", " the Work"], sentinels=2)
    model = train_tokenizer([LICENSE], config, seed=0)
    ours = Tokenizer(model)
    texts = [LICENSE, "   two </s> x  <mask>y<extra_id_0>\n\t", "é ∑漢", " the Work  the Works", ""]
    made = fast_tokenizer(model, ours, texts)
    assert made is not None
    theirs = tokenizers.Tokenizer.from_str(made.decode())
    theirs.encode_special_tokens = True
    other = (ROOT / "docs" / "model.md").read_text()
    assert theirs.encode(other).ids == ours.encode([other])[0].tolist()
    assert fast_tokenizer(model, ours, ["\u2581"]) is None, "a space mark in a text is read as a space"


def test_an_imported_tokenizer_stays_as_it_is_or_is_read_by_our_own_class(exported: Path) -> None:
    """One that puts [CLS] before each text would give transformers other tokens than the training had."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["[CLS]", "</s>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([LICENSE], trainer)
    plain = made.to_str().encode()
    assert fast_tokenizer(plain, Tokenizer(plain), [LICENSE[:500]]) == plain
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    putting = made.to_str().encode()
    assert fast_tokenizer(putting, Tokenizer(putting), [LICENSE[:500]]) is None


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
    "name",
    [
        *(*VARIANTS, "sinks", "globals", "fixed_heads", "span_sinks", "random", "routing_window"),
        *("feedback_window", "feedback_modern"),
    ],
)
def test_caches_and_pads_change_nothing(name: str) -> None:
    """Whatever the architecture's options, in float64: texts in parts, padded at either side, all logits."""
    from transformers import DynamicCache

    model = open_masks(build(variant(name))).double().eval()
    theirs = wrapped(model)
    ids = batch_of(model.config, sequences=2).input_ids
    assert torch.equal(theirs(ids).logits, model(ids))
    kept = DynamicCache(config=theirs.config)  # an entry for each layer, of which one may hold several attentions
    parts = [theirs(part, past_key_values=kept).logits for part in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-12)
    used = kept.layers[:1] if "feedback" in name else kept.layers  # whose layers share what is kept
    assert {layer.get_seq_length() for layer in used} == {ids.shape[1]}
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 7:] = 0
    alone: list[Tensor] = [model(ids[:1, 4:]), model(ids[1:, :7])]
    for use_cache in (False, True):
        found = theirs(ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(found[:1, 4:], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1:, :7], alone[1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_refined_vectors_are_no_keys_and_values() -> None:
    """So whole texts are read for each token, padded at either side, and greedy texts are ours."""
    model = build(small("refined", refine={"chunk": 4, "reweight": True})).double().eval()
    theirs, ids = wrapped(model), batch_of(model.config, sequences=2).input_ids[:, :7]
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 5:] = 0
    found = theirs(ids, attention_mask=mask).logits
    for row, part in ((0, slice(3, 7)), (1, slice(0, 5))):
        torch.testing.assert_close(found[row, part], model(ids[row : row + 1, part])[0], rtol=0, atol=1e-12)
    options: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = theirs.generate(ids[:, 1:], use_cache=False, **options)
    generation = Generation(model, [row[1:] for row in ids], Sampling(temperature=0.0))
    steps = [generation.step() for _ in range(5)]
    assert written[:, 6:].tolist() == [[step[row][0] for step in steps] for row in range(2)]
    with pytest.raises(ValueError, match="keeps no keys and values: use_cache=False"):
        theirs.generate(ids, use_cache=True, **options)
    prefix = build(small("refined", refine={"form": "prefix"})).eval()
    batch = replace(batch_of(prefix.config, 2), prefix_lengths=torch.tensor([3, 7]))
    found = wrapped(prefix, "prefix")(batch.input_ids, prefix_lengths=batch.prefix_lengths)
    assert torch.equal(found.logits, prefix.predict(batch.input_ids, None, batch))


@torch.no_grad()
def test_slots_of_all_layers_are_saved_once_and_shared_again(tmp_path: Path) -> None:
    model = open_masks(build(variant("bert_linformer"))).eval()
    theirs, ids = wrapped(model, "masked"), batch_of(model.config).input_ids
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert [name for name in saved.keys() if "slots" in name] == [n for n in model.state_dict() if "slots" in n]  # noqa: SIM118
    again = type(theirs).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids))
    [slots] = [weights for name, weights in again.model.named_parameters() if "slots" in name]
    slots.zero_()
    mixers = [module for module in again.model.modules() if isinstance(module, Linformer)]
    assert len(mixers) == 2
    assert not any(mixer.slots_of(torch.ones(1, 2, 3, 8), CAUSAL).any() for mixer in mixers)


@torch.no_grad()
def test_what_transformers_asks_for_beside_logits() -> None:
    """Labels, positions, hidden states and another vocabulary."""
    for name in ("decoder", "parallel", "bert", "two_stream"):
        config = variant(next(variant for variant in EVERY if name in variant.split("+")))
        model = open_masks(build(config)).eval()
        objective = config.traits.objectives[0]
        theirs = wrapped(model, objective)
        batch = batch_of(config, sequences=2)
        ids = batch.input_ids
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        found = theirs(ids, labels=ids, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(theirs.model.token_embed(found.hidden_states[-1]), found.logits)
        alone = theirs(ids[:1, 4:], output_hidden_states=True)
        assert len(alone.hidden_states) == len(found.hidden_states) >= config.layers + 1
        for padded, whole in zip(found.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(padded[:1, 4:], whole, rtol=0, atol=1e-5)
        logits, labels = (found.logits[:, :-1], ids[:, 1:]) if config.causal else (found.logits, ids)
        torch.testing.assert_close(found.loss, functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        assert torch.equal(theirs(ids, attention_mask=mask, position_ids=places).logits, found.logits)
        with pytest.raises(ValueError, match="position_ids: each text counts from 0"):
            theirs(ids, position_ids=places + 1)
        before = theirs(ids).logits
        theirs.resize_token_embeddings(VOCABULARY + 1, pad_to_multiple_of=8)
        assert theirs.config.vocab_size == len(theirs.get_input_embeddings().weight) == 24
        assert theirs(torch.full_like(ids, 23)).logits.shape[-1] == 24
        torch.testing.assert_close(theirs(ids).logits[..., :VOCABULARY], before)


@torch.no_grad()
def test_models_that_do_not_continue_a_text() -> None:
    """A prefix that is read both ways, and a sequence that is read for another, with its padding kept apart."""
    model = build(variant("decoder")).eval()
    batch = batch_of(model.config, sequences=2)
    batch = replace(batch, prefix_lengths=torch.tensor([3, 7]))
    theirs = wrapped(model, "prefix")
    assert not theirs.can_generate()
    found = theirs(batch.input_ids, prefix_lengths=batch.prefix_lengths)
    assert torch.equal(found.logits, model.predict(batch.input_ids, None, batch))
    model = build(variant(next(name for name in EVERY if "t5_modern" in name.split("+")))).eval()
    batch = batch_of(model.config, sequences=2)
    assert batch.decoder_input_ids is not None
    theirs = wrapped(model, "pairs")
    mask = torch.ones_like(batch.input_ids)
    mask[0, 5:] = 0
    found = theirs(batch.input_ids, mask, batch.decoder_input_ids)
    short = replace(batch, input_ids=batch.input_ids[:1, :5], decoder_input_ids=batch.decoder_input_ids[:1])
    torch.testing.assert_close(found.logits[:1], model.predict(short.input_ids, None, short))
    shifted = theirs(batch.input_ids, labels=batch.decoder_input_ids)
    start = torch.ones(2, 1, dtype=torch.int64)
    given = torch.cat([start, batch.decoder_input_ids[:, :-1]], dim=1)
    assert torch.equal(shifted.logits, theirs(batch.input_ids, decoder_input_ids=given).logits)


def test_what_transformers_cannot_do_is_refused(exported: Path) -> None:
    model, _ = from_folder(exported)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask is"):
        model(ids, attention_mask=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        model(torch.ones(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="give decoder_input_ids, or labels"):
        wrapped(build(small("encoder_decoder")), "pairs")(ids)
    with pytest.raises(TypeError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.gradient_checkpointing_enable()
