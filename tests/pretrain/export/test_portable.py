"""Exports: one folder that is a trained model, the same whatever wrote the checkpoint, and nothing of it is lost."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import CheckpointError, ConfigError, DataError, RunError
from data_pipeline.storage.dataset import Dataset
from data_pipeline.tokenize.tokenizer import TOKENIZER, model_file, train_tokenizer
from launch.cli import app
from model.generation.sampling import Sampling
from pretrain.checkpoint import shard_file
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.config.schema import load
from pretrain.export.hugging_face.folder import rows_of
from pretrain.export.use import evaluate_run, open_trained
from pretrain.inference.continuation import Continuation, Settings
from pretrain.inference.trained import find_checkpoint, read_model
from pretrain.metric_names import BITS_PER_BYTE, VALIDATION
from pretrain.probing.examine import examine
from pretrain.run.checkpoint_folder import step_path
from pretrain.run.journal import read, series
from pretrain.run.run_folder import RunFolder
from tests.runs import CHARACTERS, ROOT

Ranks = Callable[..., list[Any]]


def duet(*words: object) -> str:
    """What a command prints; a user's mistake is raised."""
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def export(*words: object) -> str:
    return duet("checkpoint", "export", *words)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts(path: Path) -> list[tuple[int, str]]:
    return list(Continuation(open_trained(path), ["the ", ""], Settings(Sampling(), tokens=20, seed=5)).pieces())


def test_the_stage_and_the_number_of_ranks_leave_no_trace(
    ranks: Ranks, run: Path, exported: Path, tmp_path: Path
) -> None:
    written = step_path(run / "checkpoints", 3)
    case = "tests.distributed.cases_checkpoint:copy_at_stage"
    ranks(case, 1, path=str(written), root=str(tmp_path / "copy"), stage=1)
    again = step_path(tmp_path / "copy", 3)
    for path, stage, world in ((written, 3, 2), (again, 1, 1)):
        manifest = Checkpoint(path).manifest
        assert (manifest.zero_stage, manifest.world_size) == (stage, world)
    export(again, "--to", tmp_path / "exported")
    assert content(tmp_path / "exported") == content(exported)
    export(f"{run}@1", "--to", tmp_path / "other")
    differ = {name for name, old in content(exported).items() if content(tmp_path / "other")[name] != old}
    assert differ == {"model.safetensors", "config.json", "EXPORT.txt", "README.md"}


def test_it_holds_each_weight_once_and_says_where_it_comes_from(run: Path, exported: Path) -> None:
    checkpoint, config = find_checkpoint(run)
    model = read_model(checkpoint, config)
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], values) for name, values in model.state_dict().items())
    assert sum(values.numel() for values in tensors.values()) == model.num_parameters(), "the tied head is there once"
    state = checkpoint.manifest.state
    facts = {
        "run": config.run.name,
        "step": "3",
        "commit": state["commit"],
        "dataset": state["data"]["fingerprint"],
    }
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} | facts
    assert json.loads((exported / "config.json").read_text())["duet"].items() >= (facts | {"step": 3}).items()
    assert "step 3" in (exported / "EXPORT.txt").read_text()
    card = (exported / "README.md").read_text()
    bits = next(point.value for point in series(read(run / "metrics.jsonl"))[BITS_PER_BYTE] if point.step == 3)
    for told in ("| step | 3 |", f"| bits per byte | {bits:.4f} of", state["data"]["fingerprint"], "LICENSE: say"):
        assert told in card
    assert "sentencepiece" not in card, "its tokenizer.json does"
    train = config.train.model_copy(update={"eval_tokens": 1})
    some = rows_of(checkpoint, config.model_copy(update={"train": train}), Dataset.of(config.data))
    assert some["bits per byte"] == f"{bits:.4f} of the held-out text, from a part of it"
    raw = json.loads((exported / "config.json").read_text())
    assert raw["num_hidden_layers"] == config.model.layers


def test_run_checkpoint_and_export_are_the_same_model(run: Path, exported: Path) -> None:
    ids = torch.arange(12)[None]
    paths = [run, step_path(run / "checkpoints", 3), exported]
    first, *others = (open_trained(path) for path in paths)
    for other in others:
        assert torch.equal(other.model(ids), first.model(ids))
        assert not other.model.training
        assert other.tokenizer.sha256 == first.tokenizer.sha256
        assert other.objective == "causal"
    assert not torch.equal(open_trained(run, 1).model(ids), first.model(ids))
    assert texts(paths[0]) == texts(paths[1]) == texts(paths[2])


def test_rounded_to_bf16(run: Path, exported: Path, tmp_path: Path) -> None:
    said = export(run, "--to", tmp_path / "half", "--dtype", "bf16").splitlines()
    before, after = next(line.split()[2::2] for line in said if line.startswith("validation loss: "))
    assert before == f"{evaluate_run(run, None)[VALIDATION]:.6f}" != after
    assert f"| validation loss | {float(after):.4f} nats" in (tmp_path / "half" / "README.md").read_text()
    whole = load_file(exported / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], values.to(torch.bfloat16)) for name, values in whole.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = open_trained(tmp_path / "half").model
    assert all(torch.equal(values, half[name].float()) for name, values in loaded.state_dict().items())


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path) -> None:
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit))
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the checkpoint could not be written"):
            export(run, "--to", tmp_path / "new" / "exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "new").iterdir()) == []


def test_it_is_there_only_when_all_is_in_it(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is looked for while it is written."""
    seen = []
    blocks, rename = shard_file._blocks, Path.rename

    def watched(*args: Any) -> Any:
        for block in blocks(*args):
            seen.append((tmp_path / "exported").exists())
            yield block

    def last(new: Path, folder: Path) -> Path:
        assert not folder.exists()
        assert {file.name for file in new.iterdir()} == {file.name for file in exported.iterdir()}
        return rename(new, folder)

    monkeypatch.setattr(shard_file, "_blocks", watched)
    monkeypatch.setattr(Path, "rename", last)
    export(run, "--to", tmp_path / "exported")
    assert seen
    assert not any(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_what_cannot_be_exported_is_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for words, kind, message in (
        ([run, "--to", exported], CheckpointError, "is there already; name a new folder"),
        ([run], ConfigError, "name one new folder: --to FOLDER, or --deepspeed FOLDER"),
        ([run, "--to", new, "--deepspeed", new], ConfigError, "name one new folder"),
        ([run, "--deepspeed", new, "--dtype", "bf16"], ConfigError, "--dtype and --layout are for --to"),
        ([f"{run}@2", "--to", new], CheckpointError, "no complete checkpoint of step 2; there are: 3, 1"),
        ([f"{step_path(run / 'checkpoints', 3)}@3", "--to", new], ConfigError, "is one checkpoint, which has one step"),
        ([tmp_path, "--to", new], RunError, "not a run folder"),
    ):
        with pytest.raises(kind, match=message):
            export(*words)
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        export(copy, "--to", new)
    copy = shutil.copytree(run, tmp_path / "damaged")
    file = step_path(copy / "checkpoints", 3) / "shard-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="shard-00001.safetensors: altered"):
        export(copy, "--to", new)
    assert not new.exists()


def test_the_tokenizer_of_the_training_or_none(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "tokenizer" / "spm.model"
    other.parent.mkdir(parents=True)
    other.write_bytes(train_tokenizer(["some other text"] * 50, TokenizerConfig(type="char"), seed=0))
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    for data, message in ((tmp_path / "other", "wrong tokenizer"), (tmp_path / "gone", "spm.model is missing")):
        folder.went_on(load([str(folder.config_file), f"data.path={data}"]), folder.facts()["dataset"])
        with pytest.raises(DataError, match=message):
            export(folder.path, "--to", tmp_path / "new")


def test_a_damaged_export_is_named(exported: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> Path:
        copy = shutil.copytree(exported, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        change(copy / name)
        return copy

    config = json.loads((exported / "config.json").read_text())
    newer = config | {"duet": config["duet"] | {"format": 3}}
    other = config | {"duet": config["duet"] | {"model": config["duet"]["model"] | {"layers": 2}}}
    odd = config | {"duet": config["duet"] | {"objective": "none"}}
    true = config | {"duet": config["duet"] | {"model": config["duet"]["model"] | {"layers": True}}}
    for name, change, message in (
        ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "model.safetensors: missing, dam"),
        ("model.safetensors", Path.unlink, "model.safetensors: missing"),
        ("spm.model", lambda file: (file.unlink(), (file.parent / "tokenizer.json").unlink()), "no tokenizer"),
        ("config.json", lambda file: file.write_text("{"), "config.json: missing, damaged"),
        ("config.json", lambda file: file.write_text("[" * 200_000), "config.json: missing, damaged"),
        ("config.json", lambda file: file.write_text('{"model_type": "gpt2"}'), "not of an export of Duet"),
        ("config.json", lambda file: file.write_text(json.dumps(newer)), "format 3 is not known here"),
        ("config.json", lambda file: file.write_text(json.dumps(other)), "of another model: .*Missing key"),
        ("config.json", lambda file: file.write_text(json.dumps(odd)), "config.json: damaged"),
        ("config.json", lambda file: file.write_text(json.dumps(true)), "config.json: damaged: .*layers.*'true'"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            open_trained(broken(name, change))


def test_what_an_export_cannot_do(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an export, which has one step; leave step 3 out"):
        duet("generate", exported, "--step", 3)
    with pytest.raises(ConfigError, match="does not say where its held-out text lies"):
        duet("eval", exported)
    with pytest.raises(RunError, match="not a run folder.*and not a checkpoint or an export"):
        duet("generate", tmp_path)


def test_the_documented_lines_of_plain_torch(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They import torch and `model` only."""
    [program] = [
        block
        for block in (ROOT / "docs" / "use.md").read_text().split("<<'END'\n")[1:]
        if "registry" in block.split("END\n")[0]
    ]
    program = program.split("END\n")[0]
    assert len(program.strip().splitlines()) <= 10
    imported = {line.split()[1].split(".")[0] for line in program.splitlines() if line.startswith(("import", "from"))}
    assert imported == {"json", "torch", "safetensors", "model"}
    monkeypatch.chdir(exported.parent)
    names: dict[str, Any] = {}
    exec(program, names)
    assert torch.equal(names["logits"], open_trained(exported).model(names["ids"]))


def test_a_run_is_evaluated_on_its_own_dataset(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one behind the same path is told, and refused if its tokens mean other text."""
    moved, data = shutil.copytree(run, tmp_path / "run"), tmp_path / "data"
    folder = RunFolder(moved)
    folder.id, config = folder.facts()["id"], folder.config()
    there = config.data.model_copy(update={"path": str(data)})
    folder.went_on(config.model_copy(update={"data": there}), folder.facts()["dataset"])  # as a start of it would
    data.symlink_to(dataset)
    evaluate_run(moved, None)
    assert "warning" not in capsys.readouterr().err
    data.unlink()
    tokenizer = f"data.tokenizer.model={model_file(dataset / TOKENIZER)}"
    duet("data", "build", CHARACTERS, tokenizer, f"data.sources.text.paths=[{ROOT / 'README.md'}]", f"data.path={data}")
    capsys.readouterr()
    evaluate_run(moved, None)
    assert "its held-out text may be another" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="two of the runs"):
        examine([moved, moved], 1, 0)
    assert "its held-out text may be another" in capsys.readouterr().err
    model_file(data / TOKENIZER).write_bytes(train_tokenizer(["other text"], TokenizerConfig(type="char"), 0))
    with pytest.raises(DataError, match="wrong tokenizer"):
        evaluate_run(moved, None)
