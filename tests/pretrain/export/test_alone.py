"""Exports where Duet is not: a process that has torch and transformers, and a `model.py` of the user's own."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from venv import EnvBuilder

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointError
from model.architectures.registry import ARCHITECTURES, build, configure
from model.config.model_config import ModelConfig
from model.generation.sampling import Sampling
from pretrain.export.hugging_face.folder import hugging_face_config, kind_of
from pretrain.export.hugging_face.sources import ENTRY, TOKENIZATION, check_alone, sources
from pretrain.export.use import open_trained
from pretrain.inference.continuation import Continuation, Settings
from tests.model.helpers import VOCABULARY, batch_of, one_of, open_masks, small
from tests.runs import documented_architecture

PROMPTS = ["You may", "The", "A"]
PROGRAM = """
import importlib.abc, json, sys
from pathlib import Path

HIDDEN = {"data_pipeline", "pretrain", "launch", "duet_pretrain", "pydantic"}

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

root = Path(sys.argv[1])
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, str(root))
import model as mine
import torch
import transformers
from safetensors.torch import load_file, save_file

found = {}
for folder in sorted(root.glob("of-*")):
    [auto] = json.loads((folder / "config.json").read_text())["auto_map"].keys() - {"AutoConfig"}
    theirs = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        found[folder.name] = theirs(**inputs).logits
    if hasattr(theirs, "generate"):
        room = theirs.config.max_position_embeddings
        found[folder.name + "/text"] = theirs.generate(inputs["input_ids"][:, :3], max_length=room, do_sample=False)
    theirs.train()
    loss = theirs(**inputs, **({} if "labels" in inputs else {"labels": inputs["input_ids"]})).loss
    loss.backward()
save_file(found, root / "found.safetensors")
exported = Path(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
batch = tokenizer(json.loads(sys.argv[3]), return_tensors="pt", padding=True)
texts = theirs.generate(**batch, max_new_tokens=8, do_sample=False)
assert mine.__file__ == str(root / "model.py") and "model.architectures" not in sys.modules
print(json.dumps(tokenizer.batch_decode(texts, skip_special_tokens=True)))
"""


def own(folder: Path) -> ModelConfig:
    """The documented architecture of a user, with a tensor that no file holds, and pydantic's alias."""
    file = folder / "gla.py"
    source = documented_architecture()
    two = "self.register_buffer('two', torch.ones(1) * 2, persistent=False)"
    for old, new in (
        ("                self.layers =", f"                {two}\n                self.layers ="),
        ("(self.layers, embedded,", "(self.layers, embedded._replace(tokens=self.two * embedded.tokens),"),
    ):
        assert old in source
        source = source.replace(old, new)
    file.write_text(source)
    shape = {"layers": 2, "width": 16, "heads": 2, "context": 12, "vocab_size": VOCABULARY}
    return configure({"architecture": f"{file}:GLA", **shape}, [])


def written(config: ModelConfig, folder: Path) -> Any:
    """Code and weights as an export has them, and inputs; the model."""
    folder.mkdir()
    objective = config.traits.objectives[0]
    torch.manual_seed(0)
    model = open_masks(build(config)).eval()
    raw = config.model_dump(mode="json")
    theirs = hugging_face_config(config, objective, "float32", 1)
    (folder / "config.json").write_text(json.dumps(theirs | {"duet": {"model": raw, "objective": objective}}))
    for name, text in sources(config).files.items():
        (folder / name).write_text(text)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    check_alone(folder, raw, {name: values.shape for name, values in model.named_parameters()})
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By folder: of each architecture there is, and of one that a user wrote."""
    root = tmp_path_factory.mktemp("alone")
    (root / "model.py").write_text("MINE = True\n")
    configs = {name: one_of(name) for name in ARCHITECTURES} | {"own": own(root)}
    made = {f"of-{name}": written(config, root / f"of-{name}") for name, config in configs.items()}
    for name, model in made.items():
        batch = batch_of(model.config, sequences=2)
        inputs = {"input_ids": batch.input_ids}
        if batch.decoder_input_ids is not None:
            inputs |= {"decoder_input_ids": batch.decoder_input_ids, "labels": batch.labels}
        save_file({name: values.contiguous() for name, values in inputs.items()}, root / name / "inputs.safetensors")
    return {"root": root} | made


def test_every_architecture_runs_where_duet_is_not(models: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    """Logits and generated tokens are ours; each learns from labels."""
    compare(sys.executable, models, exported, tmp_path)


@pytest.mark.drill
def test_so_it_does_in_a_new_environment(models: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    """That has nothing but torch and transformers, from the package index."""
    EnvBuilder(with_pip=True).create(tmp_path / "new")
    python = str(tmp_path / "new" / "bin" / "python")
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    subprocess.run([python, "-m", "pip", "install", "-q", *pinned], check=True)
    names = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"duet-pretrain", "sentencepiece"} & {line.split()[0] for line in names.splitlines()}
    compare(python, models, exported, tmp_path)


def compare(python: str, models: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    """What an interpreter computes with the exports, and what we do."""
    root = models["root"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [python, "-I", str(program), str(root), str(exported), json.dumps(PROMPTS)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(root / "found.safetensors")
    for name, model in models.items() - {("root", root)}:
        inputs = batch_of(model.config, sequences=2)
        with torch.no_grad():
            if inputs.decoder_input_ids is None:
                assert torch.equal(found[name], model(inputs.input_ids)), name
            else:
                assert torch.equal(found[name], model.predict(inputs.input_ids, None, inputs)), name
        if kind_of(model.config, model.config.traits.objectives[0]).generates:
            text = inputs.input_ids[:, :3]
            while text.shape[1] < model.config.context:
                following = model(text)[:, -1].argmax(-1).masked_fill((text[:, 3:] == 1).any(1), 1)
                text = torch.cat([text, following[:, None]], dim=1)
            assert torch.equal(found[f"{name}/text"], text[:, : found[f"{name}/text"].shape[1]]), name
    ours = [*PROMPTS]
    for number, piece in Continuation(open_trained(exported), PROMPTS, Settings(Sampling(temperature=0.0), 8)).pieces():
        ours[number] += piece
    assert json.loads(done.stdout) == ours


def test_code_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    source = documented_architecture()
    shape = {"layers": 1, "width": 16, "heads": 2, "vocab_size": VOCABULARY}
    dotted = source.replace("import torch\n", "import torch\n        import model.batch\n", 1)
    (tmp_path / "dotted.py").write_text(dotted)
    with pytest.raises(CheckpointError, match=r"`import model\.batch` cannot be copied.*`from model import …`"):
        sources(configure({"architecture": f"{tmp_path / 'dotted.py'}:GLA", **shape}, []))
    (tmp_path / "more.py").write_text("from pydantic import PositiveInt\nfrom xxhash import xxh3_64\n" + source)
    code = sources(configure({"architecture": f"{tmp_path / 'more.py'}:GLA", **shape}, []))
    assert code.needs == ("pydantic", "xxhash")
    assert "from pydantic import BaseModel" in code.files["model_config_pattern_config.py"]
    assert not any("plain_pydantic" in text for text in code.files.values())
    code = sources(small("decoder_only"), (ENTRY, TOKENIZATION))
    assert code.needs == ("numpy", "sentencepiece", "tokenizers")
    ours = ("from model", "import model", "from pretrain", "from data_pipeline", "from pydantic")
    assert not any(line.strip().startswith(ours) for text in code.files.values() for line in text.splitlines())
