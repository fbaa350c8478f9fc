"""A run of an architecture of one's own: its source belongs to it, and is run by what builds the model alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, RunError, UserError
from launch.cli import app
from launch.slurm.checks import check_memory
from launch.slurm.site import Cluster
from model.architectures import registry
from model.architectures.external import Recorded
from model.costs.flops import training_flops_per_token
from model.gpus import GPUS
from pretrain.config.architecture import keep, opened
from pretrain.config.schema import dump, load
from pretrain.export.use import evaluate_run, open_trained
from pretrain.inference.trained import find_checkpoint
from pretrain.planning.costs import changed, costs
from pretrain.planning.memory import memory
from pretrain.run.checkpoint_folder import step_path
from pretrain.run.journal import read, series
from pretrain.run.run_folder import RunFolder
from tests.runs import documented_architecture, duet, program

Ranks = Callable[..., list[Any]]
TRAIN = "tests.distributed.cases:train_run"
MARK = "\nimport os\nif os.environ.get('MARKER'):\n    open(os.environ['MARKER'], 'w').close()\n"
"""The source says so when it is run."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SITE = {"partition": "gpu", "time": "1:00:00", "gpus_per_node": 1, "gpu_memory_gib": 80}
TINY = [
    *("model.layers=1", "model.width=16", "model.heads=2", "model.context=16", "batch.tokens=128"),
    *("schedule.kind=constant", "schedule.warmup_steps=0", "engine.precision=fp32", "tracking.mode=offline"),
    *("train.log_every=1", "train.sample_tokens=0", "train.keep_checkpoints=9", "train.checkpoint_every=2"),
]


class Run:
    """The folder, and the file that was named."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.file, self.path = folder / "gla.py", folder / "run"
        self.args = [f"model.architecture={self.file}:GLA", *TINY, f"data.path={dataset}", f"run.dir={self.path}"]

    def losses(self) -> list[float]:
        return [point.value for point in series(read(self.path / "metrics.jsonl"))["loss/train"]]


@pytest.fixture(scope="module")
def trained(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps on two ranks at ZeRO 3, then two on one at ZeRO 1."""
    run = Run(tmp_path_factory.mktemp("own"), dataset)
    run.file.write_text(documented_architecture() + MARK)
    ranks(TRAIN, 2, args=[*run.args, "train.steps=2", "engine.zero_stage=3"])
    ranks(TRAIN, 1, args=[str(run.path / "config.yaml"), "train.steps=4", "engine.zero_stage=1"])
    return run


@pytest.fixture
def run(trained: Run, dataset: Path, tmp_path: Path) -> Run:
    """A copy in another place, beside a file that is as it was."""
    copy = Run(tmp_path, dataset)
    shutil.copytree(trained.path, copy.path)
    shutil.copy(trained.file, copy.file)
    return copy


def test_nodes_whose_files_differ_are_named_before_anything_is_trained(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    text, files = documented_architecture(), [tmp_path / f"n{number}" / "gla.py" for number in range(2)]
    for file in files:
        file.parent.mkdir()
        file.write_text(text)
    args = [*TINY, f"data.path={dataset}", "train.steps=1"]
    case, sources = "tests.distributed.life_cases:with_sources", list(map(str, files))
    assert ranks(case, 2, args=[*args, f"run.dir={tmp_path / 'same'}"], sources=sources) == [0, 0], "wherever they lie"
    files[1].write_text(text + "\n")
    told = ranks(case, 2, args=[*args, f"run.dir={tmp_path / 'run'}"], sources=sources)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files]
    for error in told:
        assert error.startswith("model.architecture: the source of GLA is not the same on all nodes")
        for number in range(2):
            assert re.search(rf"GLA {hashes[number]} on rank {number} on [\w.-]+[;,]", error)
    assert not (tmp_path / "run" / "attempts").exists()


def test_it_goes_on_on_another_number_of_ranks_and_stage(
    trained: Run, ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    whole = Run(tmp_path, dataset)
    whole.file.write_text(trained.file.read_text())
    ranks(TRAIN, 1, args=[*whole.args, "train.steps=4", "engine.zero_stage=1"])
    assert trained.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_the_hash_stands_in_the_run_and_in_its_checkpoints_and_the_source_goes_with_it(trained: Run) -> None:
    name = load(trained.args).model.architecture
    assert len(name.partition("@")[2]) == 64
    assert yaml.safe_load((trained.path / "config.yaml").read_text())["model"]["architecture"] == name
    assert json.loads((trained.path / "run.json").read_text())["config"]["model"]["architecture"] == name
    manifest = json.loads((step_path(trained.path / "checkpoints", 2) / "manifest.json").read_text())
    assert manifest["state"]["config"]["model"]["architecture"] == name
    assert (trained.path / "architecture" / "gla.py").read_bytes() == trained.file.read_bytes()
    assert [file.name for file in (trained.path / "architecture").iterdir()] == ["gla.py"]


def test_what_only_reads_runs_no_source(run: Run, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", str(run.path)
    commands = [["status", path], ["runs", "ls", str(tmp_path)], ["report", path], ["track", "sync", path, "--new-run"]]
    commands += [["checkpoint", name, path] for name in ("ls", "verify", "inspect")]
    source = (
        "import sys, json, os\nfrom typer.testing import CliRunner\nfrom launch.cli import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert done.exit_code == 0, (words, done.output, done.exception)\n"
        "    assert not os.path.exists(os.environ['MARKER']), words\n"
        "assert CliRunner().invoke(app, ['generate', sys.argv[2], '--prompt', 'a', '--tokens', '1']).exit_code == 0\n"
        "assert os.path.exists(os.environ['MARKER'])  # so that the marker is one\n"
    )
    done = program("-c", source, json.dumps(commands), path, cwd=tmp_path, MARKER=str(marker))
    assert done.returncode == 0, done.stderr


def test_a_run_that_was_moved_goes_on_with_its_own_copy(run: Run, ranks: Ranks) -> None:
    run.file.unlink()
    moved = run.path.rename(run.path.with_name("moved"))
    ranks(TRAIN, 1, args=[str(moved / "config.yaml"), "train.steps=5"])
    assert RunFolder(moved).saved_steps()[-1] == 5
    assert isinstance(RunFolder(moved).config().model, Recorded)
    assert type(find_checkpoint(moved)[1].model).__name__ == "GLA"
    assert type(find_checkpoint(step_path(moved / "checkpoints", 2))[1].model).__name__ == "GLA"


def test_a_job_reads_the_copy_that_was_made_when_it_was_submitted(tmp_path: Path) -> None:
    file, run = tmp_path / "gla.py", tmp_path / "run"
    file.write_text(documented_architecture())
    config = load([*TINY, f"model.architecture={file}:GLA", f"run.dir={run}"])
    (run / "slurm").mkdir(parents=True)
    keep(config.model, run)
    (run / "slurm" / "config.yaml").write_text(dump(config))
    file.write_text("raise AssertionError\n")
    assert load([str(run / "slurm" / "config.yaml")]).model == config.model


def test_another_source_under_a_run_is_refused_and_begins_a_new_one(run: Run, ranks: Ranks) -> None:
    run.file.write_text(run.file.read_text() + "# changed\n")
    folder = RunFolder(run.path)
    vocabulary = f"model.vocab_size={folder.config().model.vocab_size}"
    new = load([*run.args, "train.steps=4", vocabulary])
    way_on = (
        rf"(?s)model\.architecture: .*own copy of the source: duet train {run.path}/config.yaml, .*duet train --from"
    )
    with pytest.raises(RunError, match=way_on):
        folder.check(new, folder.facts()["dataset"])
    folder.check(load([str(folder.config_file), "train.steps=4"]), folder.facts()["dataset"])
    fork = run.path.with_name("fork")
    args = [str(folder.config_file), f"run.start_from={run.path}@4", f"run.dir={fork}", "run.name=fork"]
    ranks(TRAIN, 1, args=[*args, f"model.architecture={run.file}:GLA", "train.steps=5"])
    assert RunFolder(fork).saved_steps()[-1] == 5
    assert (fork / "architecture" / "gla.py").read_bytes() == run.file.read_bytes()


def test_a_copy_that_was_changed_is_not_run(run: Run) -> None:
    copy = run.path / "architecture" / "gla.py"
    copy.write_text(copy.read_text() + "# changed\n")
    args = [str(run.path / "config.yaml")]
    raw = yaml.safe_load(Path(args[0]).read_text())
    raw["model"]["architecture"] = raw["model"]["architecture"].replace(
        raw["model"]["architecture"].split(":")[0], "x.py"
    )
    Path(args[0]).write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"x\.py: No such file") as refused:
        load(args)
    assert "\n" not in str(refused.value)


def test_it_is_planned(run: Run) -> None:
    config = opened(RunFolder(run.path).config(), run.path)
    found = costs(config, 2, GPUS["h100"], 0.4)
    assert found.parameters == sum(p.numel() for p in registry.build(config.model).parameters())
    assert found.checkpoint_bytes == 12 * found.parameters
    assert found.flops_per_step > 6 * found.parameters * config.batch.tokens * 0.5
    one, two = (memory(changed(config, {"batch.micro_batch": rows}), 1).activations for rows in (1, 2))
    assert two == 2 * one > 0


def test_it_is_evaluated_and_exported(run: Run, tmp_path: Path) -> None:
    loss = evaluate_run(run.path, None)["loss/val"]
    assert loss == pytest.approx(series(read(run.path / "metrics.jsonl"))["loss/val"][-1].value, rel=1e-5)
    folder = tmp_path / "exported"
    done = CliRunner().invoke(app, ["checkpoint", "export", str(run.path), "--to", str(folder)])
    assert done.exit_code == 0, done.output
    words = ["checkpoint", "shrink", str(run.path), "--heads", "1", "--to", str(tmp_path / "smaller")]
    with pytest.raises(ConfigError, match="--heads: none are parts of ours in gla.py:GLA@"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    before = open_trained(run.path).model
    shutil.rmtree(run.path)
    run.file.unlink()
    assert {file.name for file in folder.iterdir()} >= {"architecture", "config.json", "model.safetensors"}
    assert (folder / "architecture.py").is_file()
    assert str(tmp_path) not in (folder / "config.json").read_text()
    after = open_trained(folder).model
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(before.logits(ids), after.logits(ids))
    (folder / "architecture" / "gla.py").write_text("raise AssertionError")
    with pytest.raises(UserError, match=r"architecture/gla\.py: has changed"):
        open_trained(folder)


def test_a_study_tells_what_it_costs(run: Run, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = opened(RunFolder(run.path).config(), run.path)
    arms = {"gla": {"about": "mine", "config": [f"model.architecture={run.file}:GLA"]}}
    section = {"title": "Mine", "seeds": [config.run.seed], "arms": arms}
    study = {"name": "own", "config": [*TINY, f"data.path={dataset}", "train.steps=2"], "sections": {"core": section}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(study))
    shutil.copytree(run.path, tmp_path / f"runs/own/core/gla/seed-{config.run.seed}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["study", "report", "own.yaml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    flops = 2 * config.batch.tokens * training_flops_per_token(config.model)
    assert f"| {flops:.3g} |" in (tmp_path / "own.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("class GLA(:\n", r"gla\.py:1: invalid syntax"),
        ("x = 1\n", "has no GLA"),
    ],
    ids=["missing", "syntax", "no class"],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "gla.py"
    if text:
        file.write_text(text)
    done = duet("train", f"model.architecture={file}:GLA", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: model: architecture: ")
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr)


def test_a_place_is_seen_from_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "gla.py").write_text(documented_architecture())
    (folder / "mine.yaml").write_text("model: {architecture: 'gla.py:GLA', forget: 4}\n")
    monkeypatch.chdir(tmp_path)
    found = load(["configs/mine.yaml"]).model
    assert found.architecture.startswith(f"{folder}/gla.py:GLA@")
    assert found.model_dump()["forget"] == 4.0
    assert load(["model.architecture=configs/gla.py:GLA"]).model.architecture == found.architecture
    with pytest.raises(ConfigError, match=r"unknown key model\.forgot; nearest valid key: model\.forget"):
        load(["configs/mine.yaml", "model.forgot=3"])


def test_a_login_node_submits_what_it_can_read_and_says_what_it_cannot_count(tmp_path: Path) -> None:
    (tmp_path / "gla.py").write_text(documented_architecture())
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom launch.slurm.checks import check_memory\n"
        "from launch.slurm.site import Cluster\nfrom pretrain.config.schema import load\n"
        f"config = load({[*TINY, 'model.vocab_size=64', 'model.architecture=gla.py:GLA']!r})\n"
        f"print(check_memory(config, Cluster.model_validate({SITE!r})))\n"
    )
    words = [sys.executable, "-P", "-c", program]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert "not looked at: " in done.stdout, done.stderr
    assert "measured with torch, which is not here" in done.stdout
    with_torch = load([*TINY, "model.vocab_size=64", f"model.architecture={tmp_path}/gla.py:GLA"])
    [finding] = check_memory(with_torch, Cluster.model_validate(SITE))
    assert "parameters at ZeRO" in finding.text
