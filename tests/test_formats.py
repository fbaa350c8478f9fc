"""Run folders and exports of older versions go on: resumed, reported, exported, used.

`formats/2026-11` is by the last version before the rooms inside the rooms (commit fb74537): a dataset; of each
architecture a run folder of eight steps as a kill after its checkpoint of step 4 leaves it, beside it what that version
computed in the steps 5 to 8; and an export of step 4.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.files.sealed import unseal
from launch.cli import app
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.differences import tensor_differences
from pretrain.config.schema import load
from pretrain.export.portable import load_export
from pretrain.inference.trained import find_checkpoint
from pretrain.run.checkpoint_folder import step_path
from pretrain.run.run_folder import FORMAT, RunFolder
from tests.conftest import RanksFailed
from tests.runs import attempts

Ranks = Callable[..., list[Any]]
OLDER = Path(__file__).parent / "formats" / "2026-11"
TRAIN = "tests.distributed.cases:train_run"
SAVED, STEPS = 4, 8
CONTINUE = ("decoder_only", "parallel_encoder_decoder")
GO_ON = (*CONTINUE, "encoder_decoder")
ALL = (*GO_ON, "encoder_only")
PROMPT = "The License"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not where the run folders say that their dataset was."""
    return shutil.copytree(OLDER / "data", tmp_path_factory.mktemp("older") / "data")


def copied(name: str, folder: Path) -> Path:
    """A run folder of the older version."""
    run: Path = shutil.copytree(OLDER / "trained" / name, folder / name)
    (run / "expected.json").unlink()
    return run


def duet(*args: str) -> str:
    """What the command line prints, in this process."""
    done = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def check_as_expected(run: Path, name: str) -> None:
    """Its second attempt began at step 4 and computed what the older version did."""
    _, (resumed_from, steps) = attempts(run / "metrics.jsonl")
    expected = json.loads((OLDER / "trained" / name / "expected.json").read_text())
    assert resumed_from == SAVED
    assert [str(step) for step in steps] == list(expected)
    for step, values in expected.items():
        for metric, value in values.items():
            # Processors round differently.
            assert steps[int(step)][metric] == pytest.approx(value, rel=1e-6), f"step {step}: {metric}"


@pytest.mark.parametrize(
    ("name", "world"), [(name, 1) for name in GO_ON] + [("parallel_encoder_decoder", 2)], ids=lambda value: str(value)
)
def test_a_run_folder_is_resumed_reported_and_exported(
    ranks: Ranks, data: Path, tmp_path: Path, name: str, world: int
) -> None:
    run = copied(name, tmp_path)
    duet("checkpoint", "verify", str(run))
    assert f"step {SAVED}," in duet("status", str(run))
    ranks(TRAIN, world, args=[str(run / "config.yaml"), f"data.path={data}"])
    check_as_expected(run, name)
    assert RunFolder(run).saved_steps() == [SAVED, STEPS]
    kept = unseal((run / "run.json").read_bytes(), formats=(FORMAT,))["config"]["train"]
    assert kept["eval_tokens"] == "all", "as the older version had it"
    report = duet("report", str(run)).strip()
    assert name in Path(report).read_text()
    duet("checkpoint", "export", str(run), "--to", str(tmp_path / "exported"))
    assert load_export(tmp_path / "exported").step == STEPS
    duet("checkpoint", "export", f"{run}@{SAVED}", "--to", str(tmp_path / "older"))
    again, older = load_export(tmp_path / "older").model, load_export(OLDER / "exports" / name).model
    ours, theirs = again.state_dict(), older.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_comparison_with_the_older_version_can_fail(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    run = copied("decoder_only", tmp_path)
    ranks(TRAIN, 1, args=[str(run / "config.yaml"), f"data.path={data}"], sabotage="forget the moments")
    with pytest.raises(AssertionError, match="optim/grad_norm|loss/total"):
        check_as_expected(run, "decoder_only")


def test_a_run_whose_labels_weighed_otherwise_goes_on_as_a_new_one(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    run, new = copied("encoder_only", tmp_path), tmp_path / "new"
    with pytest.raises(RanksFailed, match=f"duet train --from {run}@{SAVED} run.dir=NEW"):
        ranks(TRAIN, 1, args=[str(run / "config.yaml"), f"data.path={data}"])
    assert len(attempts(run / "metrics.jsonl")) == 1, "nothing was trained"
    start = ["run.name=new", f"run.dir={new}", f"run.start_from={run}@{SAVED}"]
    ranks(TRAIN, 1, args=[str(run / "config.yaml"), *start, f"data.path={data}"])
    [(resumed_from, steps)] = attempts(new / "metrics.jsonl")
    assert resumed_from == SAVED
    assert list(steps) == list(range(SAVED + 1, STEPS + 1))
    before, after = Checkpoint(step_path(RunFolder(run).checkpoints, SAVED)), find_checkpoint(new)[0]
    assert before.manifest.shapes == after.manifest.shapes
    assert before.manifest.buffers == after.manifest.buffers != {}
    assert all(0 < found.largest < 1 for found in tensor_differences(before, after) if found.state == "fp32")
    duet("report", str(new))
    duet("checkpoint", "export", str(new), "--to", str(tmp_path / "exported"))
    assert load_export(tmp_path / "exported").step == STEPS


@pytest.mark.parametrize("name", ALL)
def test_an_export_is_used(data: Path, tmp_path: Path, name: str) -> None:
    export = OLDER / "exports" / name
    if name in CONTINUE:
        text = duet("generate", str(export), "--prompt", PROMPT, "--tokens", "5", "--greedy")
        run = copied(name, tmp_path)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("/home/you/data", str(data)))
        # Its run continues alike: the same weights were read into the same places.
        assert text == duet("generate", str(run), "--prompt", PROMPT, "--tokens", "5", "--greedy")
        assert text.startswith(PROMPT)
        assert len(text) > len(PROMPT) + 1
    else:
        assert load_export(export).step == SAVED
        with pytest.raises(ConfigError, match=name):
            duet("generate", str(export), "--prompt", PROMPT)


@pytest.mark.parametrize("name", ALL)
def test_keys_that_an_architecture_lacks_are_read_at_their_old_default(tmp_path: Path, name: str) -> None:
    run = copied(name, tmp_path)
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert written["streams"] == "plain"
    config = load([str(run / "config.yaml")])
    assert config == RunFolder(run).config().model_copy(update={"run": config.run, "train": config.train})
    dumped = config.model.model_dump(mode="json")
    foreign = written.keys() - dumped.keys()
    assert {"streams"} <= foreign
    assert (foreign == {"streams"}) == (name == "parallel_encoder_decoder")
    # What has come since is at its default.
    defaults = type(config.model).model_validate({}).model_dump(mode="json")
    assert dumped == {key: written.get(key, default) for key, default in defaults.items()}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("streams", "batched", "model.*streams=batched was never faster, and is gone; leave model.streams out"),
        ("topology", "serial", "model.*topology: decoder_only has no second stream; leave it out"),
    ],
)
def test_keys_that_mean_something_no_more_are_refused_by_name(tmp_path: Path, key: str, value: str, told: str) -> None:
    run = copied("decoder_only", tmp_path)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["model"][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match=f"^{run}/config.yaml: {told}$"):
        load([str(run / "config.yaml")])
    with pytest.raises(RunError, match=told):
        RunFolder(run).config()


def test_a_preset_goes_under_another_architecture() -> None:
    shown = yaml.safe_load(duet("config", "show", "model/tiny", "model.architecture=decoder_only"))["model"]
    tiny, alone = load(["model/tiny"]).model, load(["model.architecture=decoder_only"]).model
    assert shown["architecture"] == "decoder_only"
    assert shown.keys() == alone.model_dump().keys()
    assert (shown["layers"], shown["width"], shown["context"]) == (tiny.layers, tiny.width, tiny.context)
