"""A run folder belongs to one run."""

import json
import random
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import CheckpointError, RunError
from pretrain.config.schema import load
from pretrain.run.journal import Journal
from pretrain.run.run_folder import RunFolder
from tests.pretrain.run.damage import flipped


def trained(path: Path, *args: str) -> RunFolder:
    """A run folder whose run has taken a step."""
    folder = RunFolder(path)
    folder.claim(load(list(args)), {"fingerprint": "f" * 64, "path": "data/x"})
    journal = Journal(folder.journal, 1)
    journal.metrics(1, {"loss/train": 1.0})
    journal.close()
    return folder


def test_a_folder_whose_run_took_no_step_belongs_to_nobody(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(load([]), {"fingerprint": "a" * 64, "path": "data/x"})
    folder.claim(load(["optimizer.lr=1"]), {"fingerprint": "b" * 64, "path": "data/y"})
    assert folder.config() == load(["optimizer.lr=1"])
    assert folder.facts()["dataset"]["fingerprint"] == "b" * 64


DAMAGED = (b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"format": 2, "dataset": {}}', b"\0" * 512)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_run_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    folder = trained(tmp_path)
    folder.run_file.write_bytes(content)
    for look in (folder.config, folder.facts, lambda: folder.claim(load([]), {"fingerprint": "f" * 64, "path": "x"})):
        with pytest.raises(RunError, match="run.json: damaged: .*restore it"):
            look()


def test_a_run_file_that_is_gone_is_missed(tmp_path: Path) -> None:
    """Else the run would go on as whatever it is started as."""
    folder = trained(tmp_path)
    folder.run_file.unlink()
    with pytest.raises(RunError, match="run.json is missing; restore it"):
        folder.claim(load(["optimizer.lr=1"]), {"fingerprint": "f" * 64, "path": "data/x"})


def test_an_edited_config_yaml_is_compared_with_the_run(tmp_path: Path) -> None:
    """It is a copy to start with, and damage to it does not matter to those who use the run."""
    folder, dataset = trained(tmp_path), {"fingerprint": "f" * 64, "path": "data/x"}
    text = folder.config_file.read_text()
    folder.config_file.write_text(text.replace("log_every: 10", "log_every: 7"))
    folder.claim(load([str(folder.config_file)]), dataset)
    folder.config_file.write_text(text.replace("lr: 0.0009", "lr: 0.0008"))
    with pytest.raises(RunError, match=r"optimizer.lr: 0.0009 in the run, 0.0008 now"):
        folder.claim(load([str(folder.config_file)]), dataset)
    folder.config_file.write_bytes(b"\xff")
    assert folder.config() == load([])


@pytest.mark.parametrize("flips", [300, pytest.param(20_000, marks=pytest.mark.drill)])
def test_no_bit_that_flips_in_run_json_is_taken_for_something_else(tmp_path: Path, flips: int) -> None:
    folder = trained(tmp_path)
    whole, facts, config = folder.run_file.read_bytes(), folder.facts(), folder.config()
    results = {"the same": 0, "refused": 0}
    for number in random.Random(16).sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        folder.run_file.write_bytes(flipped(whole, number))
        try:
            assert (folder.facts(), folder.config()) == (facts, config), f"bit {number} was accepted"
            results["the same"] += 1
        except RunError:
            results["refused"] += 1
    print(f"run.json: {sum(results.values())} flips: {results}")
    assert results["refused"] > results["the same"]


def test_a_run_folder_of_format_1_is_read_and_becomes_one_of_format_2(tmp_path: Path) -> None:
    """Its identity has no hash, and the configuration is that of config.yaml."""
    shutil.copytree(Path(__file__).parents[1] / "run-format-1", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    config, dataset = folder.config(), folder.facts()["dataset"]
    assert (config.optimizer.lr, folder.facts()["parameters"]) == (0.01, 10544)
    folder.claim(config, dataset)
    with pytest.raises(RunError, match="optimizer.lr"):
        folder.claim(load([str(folder.config_file), "optimizer.lr=1"]), dataset)
    folder.went_on(config, dataset)
    assert (folder.config(), folder.facts()["parameters"]) == (config, 10544)
    assert json.loads(folder.run_file.read_text())["format"] == 2
    folder.run_file.write_text('{"format": 1, "dataset": ["a"]}')
    with pytest.raises(RunError, match="run.json: damaged"):
        folder.facts()


def test_checkpoints_that_are_gone_are_missed(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    folder.check_never_saved()
    journal = Journal(folder.journal, 1)
    journal.event("checkpoint", step=7, path="checkpoints/step-000000007")
    journal.close()
    with pytest.raises(CheckpointError, match="a checkpoint of step 7"):
        folder.check_never_saved()


def test_a_run_of_constant_learning_rate_may_become_longer_and_no_shorter_than_it_is(tmp_path: Path) -> None:
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    folder = trained(tmp_path, "schedule.kind=constant", "train.steps=10")
    folder.claim(load(["schedule.kind=constant", "train.steps=20"]), dataset)
    with pytest.raises(RunError, match="schedule.kind"):
        folder.claim(load(["train.steps=20"]), dataset)
    (folder.checkpoints / "step-000000015").mkdir(parents=True)
    (folder.checkpoints / "step-000000015" / "manifest.json").touch()
    folder.claim(load(["schedule.kind=constant", "train.steps=15"]), dataset)
    with pytest.raises(RunError, match="train.steps=14, but .* its newest checkpoint is of step 15"):
        folder.claim(load(["schedule.kind=constant", "train.steps=14"]), dataset)


def test_the_end_of_a_wsd_run_may_move_until_its_cooldown_has_begun(tmp_path: Path) -> None:
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    wsd = ["schedule.kind=wsd", "schedule.cooldown=20", "schedule.warmup_steps=5"]
    folder = trained(tmp_path, *wsd, "train.steps=100")

    def claim(steps: int, *more: str) -> None:
        folder.claim(config := load([*wsd, f"train.steps={steps}", *more]), dataset)
        folder.went_on(config, dataset)

    def save(step: int) -> None:
        checkpoint = folder.checkpoints / f"step-{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()

    claim(60)
    save(80)
    with pytest.raises(RunError, match="begins after step 40, and the newest checkpoint is of step 80"):
        claim(100)
    (folder.checkpoints / "step-000000080" / "manifest.json").unlink()
    claim(100)
    save(79)
    claim(120)
    with pytest.raises(RunError, match=r"step 78, .*step 79; .* duet train --from .* train.steps=98"):
        claim(98)
    with pytest.raises(RunError, match="schedule.cooldown: 20 in the run, 10 now"):
        claim(120, "schedule.cooldown=10")


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(RunError, match="ffffffffffff .*bbbbbbbbbbbb"):
        folder.claim(load([]), {"fingerprint": "b" * 64, "path": "data/x"})


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        RunFolder(tmp_path).facts()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).config()
