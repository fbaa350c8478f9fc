"""An architecture of one's own: a class in a file, or an installed one."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from model.architectures import external, registry
from model.architectures.registry import configure
from model.config.model_config import ModelConfig
from model.costs.totals import CostsUnknown, activations, num_parameters, parameters_by_part, sample_flops_by_part
from model.generation.generate import generate
from model.generation.sampling import Sampling
from tests.model.helpers import batch_of, small
from tests.runs import ROOT, documented_architecture

PLAIN = '''
from typing import ClassVar

from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.config.transformer import TransformerConfig


class Plain(TransformerConfig, frozen=True):
    """As ours, but for its costs, which it does not say."""

    traits: ClassVar = DecoderOnlyConfig.traits

    def build(self):
        from model.architectures.decoder_only.model import DecoderOnly

        return DecoderOnly(self)
'''
SHAPE = {"layers": 2, "width": 16, "heads": 2, "context": 12, "vocab_size": 17}


def written(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


def opened(file: str, name: str = "Plain", **keys: Any) -> ModelConfig:
    return configure(SHAPE | keys | {"architecture": f"{file}:{name}"}, [])


def test_its_name_is_written_down_with_the_hash_of_its_source(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN)
    found = opened(file)
    sha256 = hashlib.sha256(PLAIN.encode()).hexdigest()
    assert found.architecture == f"{file}:Plain@{sha256}"
    assert external.source(found) == ("mine.py", PLAIN.encode())
    assert external.source(small()) is None
    again = configure(found.model_dump(mode="json"), [])
    assert type(again) is type(found)
    assert again == found


def test_the_same_source_elsewhere_is_the_same_architecture(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, other = (opened(written(tmp_path / folder, PLAIN)).architecture for folder in ("a", "b"))
    assert one != other
    assert external.same(one, other)
    (tmp_path / "other.py").write_text(PLAIN)
    assert external.source(opened(str(tmp_path / "other.py"))) == ("other.py", PLAIN.encode())
    changed = opened(written(tmp_path / "b", PLAIN + "# later\n")).architecture
    assert not external.same(one, changed)


def test_only_source_of_the_hash_that_is_written_down_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"{PLAIN}\nimport pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    found = opened(written(tmp_path, text))
    marker.unlink()
    copy = tmp_path / "run" / external.FOLDER / "mine.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(text)
    file = written(tmp_path, f"{text}# changed\n")
    kept = found.model_dump(mode="json")
    assert configure(kept, [tmp_path / "run"]).architecture == found.architecture  # its own copy
    copy.write_text(f"{text}# changed otherwise\n")
    with pytest.raises(ValueError, match=rf"(?s){copy}: has changed.*{file}: has changed.*--from") as refused:
        configure(kept, [tmp_path / "run"])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] in str(refused.value)
    assert not marker.exists()


def test_without_leave_no_source_is_run_and_the_keys_stay_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path, "raise AssertionError")
    raw = SHAPE | {"architecture": f"{file}:Mine@{'0' * 64}", "norm": "batchnorm", "mine": {"deep": [1, 2.5]}}
    found = configure(raw)
    assert isinstance(found, external.Recorded)
    assert found.model_dump(mode="json").items() >= raw.items()
    assert found.dropout_sites == ()
    assert configure(raw | {"learned_dropout": {"enabled": True}}).dropout_sites
    with pytest.raises(ConfigError, match="without the hash of its source it is not run"):
        external.open_recorded(external.Recorded(architecture=f"{file}:Mine"), [])


WRONG = {
    "there is no such class": ("x = 1", "has no Plain; there are: no configurations"),
    "nearest": (PLAIN.replace("class Plain", "class Other"), "has no Plain; there are: Other"),
    "no class": ("Plain = 3", "Plain is not a subclass of ModelConfig"),
    "not a subclass": ("class Plain: pass", "Plain is not a subclass of ModelConfig"),
    "no traits": (PLAIN.replace("    traits:", "    other:"), "has no `traits"),
    "no such site": (
        PLAIN.replace("= DecoderOnlyConfig.traits", "= type(DecoderOnlyConfig.traits)((), '', ('dec_fff',))"),
        "no site is called dec_fff; there are enc_ff, dec_ff, ",
    ),
    "no build": (PLAIN.replace("def build", "def make"), r"has no `build\(self\)`"),
    "own name": (PLAIN + '    architecture: str | int = "plain"\n', "leave that field out"),
    "syntax": ("x = 1\nclass Plain(:\n", r"mine\.py:2: invalid syntax"),
    "an error": ("x = 1\n\nx.y\n", r"mine\.py:3: AttributeError"),
    "exits": ("import sys\nsys.exit(3)\n", r"mine\.py:2: SystemExit: 3"),
    "a file beside it": ("import not_there_at_all\n", r"mine\.py:1: ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_architecture_is_said_with_its_place(tmp_path: Path, name: str) -> None:
    text, said = WRONG[name]
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}.*{said}"):
        opened(written(tmp_path, text))
    assert name not in ("syntax", "an error", "exits") or set(sys.modules) == modules


def test_a_file_that_is_not_there_and_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}/mine.py: No such file"):
        opened(f"{tmp_path}/mine.py")
    with pytest.raises(ValueError, match="expected a name, or FILE.py:NAME"):
        configure({"architecture": "mine.py"}, [])
    everywhere: tuple[list[Path] | None, ...] = (None, [])
    for sources in everywhere:
        with pytest.raises(ValueError, match="architecture=mine: not known; there are .*decoder_only.*FILE.py:NAME"):
            configure({"architecture": "mine"}, sources)


def test_keys_of_others_are_passed_over_at_their_default_only(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN)
    assert opened(file, topology="parallel", streams="plain") == opened(file)
    with pytest.raises(ValueError, match=r"topology: .*mine\.py:Plain has no second stream; leave it out"):
        opened(file, topology="serial")
    with pytest.raises(ValueError, match="Extra inputs"):
        opened(file, nothing=1)


def test_what_is_built_must_be_a_backbone(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN.replace("return DecoderOnly(self)", "return DecoderOnly"))
    with pytest.raises(ConfigError, match=r"Plain\.build\(\) gave a type, which is not a Backbone"):
        registry.build(opened(file))
    tensors = """
        class Tensors(DecoderOnly):
            def forward(self, embedded, *_):
                return embedded.tokens

        return Tensors(self)"""
    file = written(tmp_path, PLAIN.replace("\n        return DecoderOnly(self)", tensors))
    model = registry.build(opened(file))
    with pytest.raises(ConfigError, match=r"Tensors\.forward\(\) gave a Tensor, and a Backbone gives a Hidden"):
        model(torch.ones(1, 3, dtype=torch.long))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that can be imported, and entry points that name its class."""
    (tmp_path / "package_of_mine.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    found = (
        metadata.EntryPoint("mine", "package_of_mine:Plain", external.GROUP),
        metadata.EntryPoint("again", "package_of_mine:DecoderOnlyConfig", external.GROUP),
        metadata.EntryPoint("gone", "package_that_is_gone:Plain", external.GROUP),
        metadata.EntryPoint("twice", "package_of_mine:Plain", external.GROUP),
        metadata.EntryPoint("twice", "package_of_another:Plain", external.GROUP),
    )
    monkeypatch.setattr(external, "points", lambda: found)
    yield tmp_path
    sys.modules.pop("package_of_mine", None)


def test_an_installed_one_is_named_and_held_to_its_source(install: Path) -> None:
    found = configure(SHAPE | {"architecture": "mine"}, [])
    assert found.architecture == f"mine@{hashlib.sha256(PLAIN.encode()).hexdigest()}"
    assert configure(found.model_dump(), []) == found
    assert external.source(found) == ("package_of_mine.py", PLAIN.encode())
    assert isinstance(configure(found.model_dump()), external.Recorded)
    (install / "package_of_mine.py").write_text(PLAIN + "# newer\n")
    with pytest.raises(ValueError, match="has changed: .*install the package of then, or begin a new run"):
        configure(found.model_dump(), [])
    for name, said in (
        ("again", r"is defined in model\.architectures\.decoder_only\.spec; name it there|leave that field out"),
        ("gone", "package_that_is_gone"),
        ("twice", "several packages have it"),
        ("other", "not known; there are .*, mine, again, gone, twice, and"),
    ):
        with pytest.raises(ValueError, match=said):
            configure(SHAPE | {"architecture": name}, [])


def test_a_package_is_asked_for_its_entry_points(tmp_path: Path) -> None:
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{external.GROUP}]\nmine = package_of_mine:Plain\n")
    (tmp_path / "package_of_mine.py").write_text(PLAIN)
    program = "from model.architectures.registry import configure\n"
    program += "print(configure({'architecture': 'mine', 'layers': 7}, []).architecture)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"mine@{hashlib.sha256(PLAIN.encode()).hexdigest()}\n", done.stderr


def test_a_name_of_ours_cannot_be_taken(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("decoder_only", "package_of_mine:Plain", external.GROUP)
    monkeypatch.setattr(external, "points", lambda: (point,))
    with pytest.raises(ValueError, match="an installed package has one of that name, too .*package_of_mine:Plain"):
        configure(SHAPE | {"architecture": "decoder_only"}, [])
    assert configure(SHAPE | {"architecture": "decoder_only"}).architecture == "decoder_only"


@pytest.mark.parametrize("size", [2, 4])
def test_costs_that_are_measured_are_those_that_ours_say(tmp_path: Path, size: int) -> None:
    keys: dict[str, Any] = {"context": 24, "width": 48, "learned_dropout": {"enabled": False}, "attention": "explicit"}
    mine, ours = opened(written(tmp_path, PLAIN), **keys), small("decoder_only", **keys)
    assert num_parameters(mine) == num_parameters(ours) == sum(p.numel() for p in registry.build(mine).parameters())
    for part in ("token table", "position table"):
        assert parameters_by_part(mine)[part] == parameters_by_part(ours)[part]
    assert sum(sample_flops_by_part(mine).values()) == sum(sample_flops_by_part(ours).values())
    one, other = activations(mine, 5, size), activations(ours, 5, size)
    assert (one.layer_inputs, one.loss, one.logits) == (other.layer_inputs, other.loss, other.logits)
    assert one.kept(checkpointing=False) == pytest.approx(other.kept(checkpointing=False), rel=0.1)
    assert one.kept(checkpointing=True) == pytest.approx(other.kept(checkpointing=True), rel=0.1)
    assert one.largest_layer == pytest.approx(other.largest_layer, rel=0.1)


def test_measuring_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    text = PLAIN.replace("return Dec", "import torch\n        torch.rand(3, device='cpu')\n        return Dec")
    mine = opened(written(tmp_path, text))
    before = torch.get_rng_state()
    assert num_parameters(mine)
    assert torch.equal(torch.get_rng_state(), before)


def test_costs_that_cannot_be_measured_are_unknown(tmp_path: Path) -> None:
    text = PLAIN.replace("return Dec", "import torch\n        float(torch.ones(1).sum())\n        return Dec")
    with pytest.raises(CostsUnknown, match=r"mine\.py:Plain does not say what it costs.*meta.*`costs\(self, shape\)"):
        num_parameters(opened(written(tmp_path, text)))


def test_own_costs_are_asked_and_not_measured(tmp_path: Path) -> None:
    own = "\n    def costs(self, shape):\n        from model.costs.parts import Costs, Part\n\n"
    text = PLAIN + own + '        return Costs([Part("all", 7, 9)], [], 0)\n'
    assert parameters_by_part(opened(written(tmp_path, text))) == {"all": 7}


def gla(folder: Path, **keys: object) -> ModelConfig:
    return opened(written(folder, documented_architecture()), "GLA", **keys)


def test_the_documented_one_is_causal_and_continues_texts_each_as_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = registry.build(gla(tmp_path)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 17, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 17
    torch.testing.assert_close(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(ids)[:, 7:], model(changed)[:, 7:])
    greedy = Sampling(temperature=0.0)
    text = ids[0, :4]
    for token in generate(model, text, greedy, max_new_tokens=12):  # beyond the context, too
        assert token == int(model(text[None, -12:])[0, -1].argmax())
        text = torch.cat([text, torch.tensor([token])])
    assert len(text) == 16


def test_texts_of_different_lengths_grow_side_by_side_as_alone(tmp_path: Path) -> None:
    from model.generation.generate import Generation

    torch.manual_seed(0)
    model = registry.build(gla(tmp_path)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [torch.tensor([3]), torch.tensor([5, 1, 2, 9, 4]), torch.tensor([7, 7])]
    greedy = Sampling(temperature=0.0)
    together = Generation(model, prompts, greedy)
    texts: list[list[int]] = [[], [], []]
    for _ in range(10):
        for number, tokens in together.step().items():
            texts[number] += tokens
    assert texts == [list(generate(model, prompt, greedy, max_new_tokens=10)) for prompt in prompts]


def test_the_documented_one_learns_and_has_masks_as_ours(tmp_path: Path) -> None:
    config = gla(tmp_path, learned_dropout={"sites": ["dec_sa", "dec_ff", "embed"]})
    model = registry.build(config)
    batch = batch_of(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        output = model(batch)
        losses.append(float(output.metrics["cross_entropy"]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert {"density/dec_sa/00", "density/dec_ff/01", "density/embed/00"} <= output.metrics.keys()


def test_a_login_node_reads_a_class_that_asks_for_torch_in_build_only(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom model.architectures.registry import configure\n"
        "from model.costs.totals import num_parameters\n"
        "shape = configure({'architecture': sys.argv[1], 'vocab_size': 17}, [])\nprint('read', shape.heads)\n"
        "num_parameters(shape)"
    )

    def run(file: str, name: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", program, f"{file}:{name}"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    read = run(written(tmp_path, documented_architecture()), "GLA")
    assert read.stdout == "read 4\n"
    assert "GLA does not say what it costs, so that is measured with torch, which is not here" in read.stderr
    refused = run(written(tmp_path, f"import os\nimport torch\n{PLAIN}"), "Plain")
    assert "mine.py:2: needs torch, which is not here" in refused.stderr
