"""Layouts that others know: transformers' own models and ours compute the same, both ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointError, ConfigError, DataError
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.export import standard
from pretrain.export.layouts import check_fits, to_theirs
from pretrain.export.standard import import_model, write_standard
from pretrain.export.use import open_trained
from pretrain.inference.trained import find_checkpoint
from tests.model.helpers import small
from tests.runs import ROOT, SMALL

Ranks = Callable[..., list[Any]]
LICENSE = (ROOT / "LICENSE").read_text()
IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
LLAMA = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
PLAIN = {"learned_dropout": {"enabled": False}}
MODERN = {"positions": "rotary", "norm": "rmsnorm", "ff": "swiglu"}


def byte_tokenizer() -> Any:
    """As transformers has them, with one special piece."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([LICENSE], trainer)
    return made


def saved(folder: Path, kind: str, **changes: Any) -> Any:
    """A model of transformers, freshly initialised, with a tokenizer of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        shape = {"vocab_size": 320, "max_position_embeddings": 12, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | shape | {"num_key_value_heads": 2} | changes))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, **GPT2 | changes))
    with torch.no_grad():
        for values in model.parameters():  # biases and norms start at what they would be without
            values.add_(torch.randn_like(values), alpha=0.05)
    model.eval().save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("gpt2", {}),
        ("gpt2", {"activation_function": "gelu"}),
    ],
)
def test_a_model_of_transformers_and_back(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    theirs = saved(tmp_path / "theirs", kind, **changes)
    config = import_model(tmp_path / "theirs", tmp_path / "ours")
    ours = open_trained(tmp_path / "ours")
    # The rows of 20 tokens that the tokenizer has not are left out.
    torch.testing.assert_close(ours.model(IDS), theirs(IDS).logits[..., :300], rtol=0, atol=1e-5)
    assert ours.tokenizer.decode(ours.tokenizer.encode([LICENSE[:99]])[0]) == LICENSE[:99]
    back = to_theirs(ours.model.state_dict(), config, kind)
    kept = theirs.state_dict()
    assert back.keys() == kept.keys() - {"lm_head.weight"}
    assert all(torch.equal(values, kept[name][: len(values)]) for name, values in back.items())


@torch.no_grad()
def test_a_run_goes_out_in_a_layout_and_comes_back(
    ranks: Ranks, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small_run = [option for option in SMALL if "learned_dropout" not in option]
    shape = ["model.architecture=decoder_only", "model.learned_dropout.enabled=false", f"data.path={dataset}"]
    for kind, keys in (("llama", MODERN), ("gpt2", {"ff": "gelu_tanh"})):
        more = [f"model.{key}={value}" for key, value in keys.items()]
        run = tmp_path / kind
        args = [*small_run, *shape, *more, f"run.dir={run}", "train.steps=2"]
        ranks("tests.distributed.cases:train_run", 1, args=args)
        checkpoint, config = find_checkpoint(run)
        folder = tmp_path / f"{kind}-exported"
        write_standard(checkpoint, config, folder, kind)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ours = open_trained(run)
        ids = IDS % ours.tokenizer.vocab_size
        assert type(theirs).__module__.startswith("transformers.models.")
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)
        text = LICENSE[:200]
        assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ours.tokenizer.encode([text])[0].tolist()
        assert "trust_remote_code" not in (folder / "README.md").read_text()
        import_model(folder, tmp_path / f"{kind}-again")
        again = open_trained(tmp_path / f"{kind}-again").model
        torch.testing.assert_close(again(ids), ours.model(ids), rtol=0, atol=1e-6)
    prefixes = config.model_copy(update={"data": config.data.model_copy(update={"objective": "prefix"})})
    with pytest.raises(ConfigError, match="data.objective=prefix does not fit --layout gpt2"):
        write_standard(checkpoint, prefixes, tmp_path / "prefixes", "gpt2")
    putting = byte_tokenizer()
    putting.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    putting.save(str(tmp_path / "tokenizer.json"))
    with_bos = (tmp_path / "tokenizer.json", Tokenizer.load(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(standard, "tokenizer_of", lambda *of: with_bos)  # as of a run that began with such a Llama
    write_standard(checkpoint, config, tmp_path / "bare", "gpt2")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "bare")(text).input_ids
    assert theirs == with_bos[1].encode([text])[0].tolist(), "the model saw no BOS"


@pytest.mark.parametrize(
    ("kind", "changes", "first"),
    [
        ("llama", {"positions": "learned"}, "model.positions=learned"),
        ("llama", {"norm_position": "post"}, "model.norm_position=post"),
        ("gpt2", {"ff": "swiglu"}, "model.ff=swiglu"),
        ("gpt2", {"kv_heads": 1}, "model.kv_heads=1"),
        ("gpt2", {"pattern": {"kind": "window", "window": 4}}, "model.pattern "),
        ("gpt2", {"learned_dropout": {"enabled": True}}, "model.learned_dropout.enabled=true"),
        ("gpt2", {"l0": {"enabled": True}}, "model.l0 "),
        ("gpt2", {"architecture": "parallel_encoder_decoder"}, "model.architecture=parallel_encoder_decoder"),
    ],
)
def test_what_a_layout_does_not_have_is_named(kind: str, changes: dict[str, Any], first: str) -> None:
    shape: dict[str, Any] = {"architecture": "decoder_only"} | PLAIN | (MODERN if kind == "llama" else {})
    check_fits(small(**shape), kind)
    with pytest.raises(ConfigError, match=f"{first}.*does not fit --layout {kind}"):
        check_fits(small(**shape | changes), kind)


def test_what_does_not_come_in_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "llama", "llama")
    saved(tmp_path / "gpt2", "gpt2")

    def refused(kind: str, message: str, error: type[Exception] = CheckpointError, **changes: Any) -> None:
        folder = Path(shutil.copytree(tmp_path / kind, tmp_path / str(len(list(tmp_path.iterdir())))))
        tensors = changes.pop("tensors", None)
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
        if tensors is not None:
            save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
        if error is DataError:
            (folder / "tokenizer.json").unlink()
        with pytest.raises(error, match=message):
            import_model(folder, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    refused("llama", "model_type='qwen2': this version takes llama and gpt2", model_type="qwen2")
    refused("llama", "hidden_act='gelu' does not fit: our models have 'silu'", hidden_act="gelu")
    refused("llama", "rms_norm_eps=1e-06 does not fit", rms_norm_eps=1e-6)
    refused("llama", "rope_parameters=.*500000.0.*does not fit", rope_parameters={"rope_theta": 500000.0})
    refused("llama", "tie_word_embeddings=False does not fit", tie_word_embeddings=False)
    refused("llama", "head_dim=8 does not fit", head_dim=8)
    refused("llama", "None where heads is an integer", num_attention_heads=None)
    refused("llama", "True where layers is an integer", num_hidden_layers=True)
    refused("llama", "None where ff_width is an integer", intermediate_size=None)
    refused("gpt2", "a size that is no number", n_embd=None)
    up = "model.layers.0.mlp.up_proj.weight"
    refused("llama", f"{up} is torch.int8: quantized", tensors={up: torch.ones(40, 16, dtype=torch.int8)})
    refused("llama", "mlp_bias=True and attention_bias differ", mlp_bias=True)
    refused("llama", "quantization_config", quantization_config={})
    refused("llama", r"backbone\.layers\.0\.ff\.down\.weight is .*40.* makes it .*48", intermediate_size=48)
    refused("llama", "no tensor model.layers.2.input_layernorm.weight", num_hidden_layers=3)
    refused("gpt2", "activation_function='relu' does not fit: .*'gelu_new' or .*'gelu'$", activation_function="relu")
    refused("gpt2", "tie_word_embeddings: its head is another", tensors={"lm_head.weight": torch.zeros(320, 16)})
    refused("gpt2", "nothing of ours takes this tensor", tensors={"transformer.h.0.more": torch.zeros(1)})
    refused("gpt2", "no tokenizer", DataError)
    refused("gpt2", "vocab_size=200: its tokenizer has 300 tokens|makes it", vocab_size=200)
