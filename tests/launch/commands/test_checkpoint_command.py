"""`duet checkpoint` on a run of two ranks."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.errors import CheckpointError, RunError
from launch.cli import app
from pretrain.checkpoint import checkpoint as checkpoint_module
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.differences import tensor_differences
from pretrain.config.schema import load
from pretrain.export.use import open_trained
from pretrain.inference.trained import find_checkpoint
from pretrain.run import checkpoint_folder
from pretrain.run.checkpoint_folder import remove, step_of, step_path
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from tests.checkpoints import age, manifest_of, write_manifest
from tests.runs import SMALL, duet, program

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved at 1, 4, 8 and 12, validated at 8 and 12."""
    run_dir = tmp_path_factory.mktemp("checkpoint-command") / "run"
    cadence = ["train.steps=12", "train.checkpoint_every=4", "train.eval_every=8", "train.keep_checkpoints=1"]
    args = [*SMALL, f"data.path={dataset}", f"run.dir={run_dir}", *cadence, "train.keep_every=4"]
    ranks("tests.distributed.cases:train_run", 2, args=args)
    return run_dir


def checkpoint(*words: object) -> str:
    """What the command prints; a user's mistake is raised."""
    done = CliRunner().invoke(app, ["checkpoint", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_ls_says_what_there_is_and_why(run: Path) -> None:
    lines = checkpoint("ls", run).splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines] == ["12", "8", "4"]
    assert lines[0].endswith("newest, every 4, best")
    assert "not validated" in lines[2]
    assert "MiB" in lines[0]
    assert " s old" in lines[0] or " min old" in lines[0]
    assert f"validation {Checkpoint(step_path(run / 'checkpoints', 8)).manifest.validation_loss:.4f}" in lines[1]


def test_ls_names_a_damaged_one(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-000000012" / "manifest.json").write_text("{")
    [first, *_] = checkpoint("ls", copy).splitlines()
    assert "DAMAGED" in first
    assert "manifest.json: damaged: not JSON" in first


def test_inspect_shows_everything_that_is_not_a_tensor(run: Path) -> None:
    shown = checkpoint("inspect", run)
    width = shown.splitlines()[2].index("12")
    assert shown.splitlines()[2:4] == [f"{'step':<{width}}12", f"{'written by':<{width}}2 rank(s) at ZeRO 1"]
    for word in ("samples_seen", "tokens_seen", "fingerprint", "tokenizer", "warmup_steps", "commit", "mlflow_run"):
        assert word in shown
    assert "token_embed.weight" in shown
    assert "shard-00001.safetensors" in shown
    state = Checkpoint(step_path(run / "checkpoints", 12)).manifest.state
    assert state["data"]["tokens_seen"] == 12 * 128
    assert len(state["commit"]) == 40


def test_diff_of_a_checkpoint_with_itself_and_with_another(run: Path) -> None:
    [newest, older] = (step_path(run / "checkpoints", step) for step in (12, 8))
    states = 3 * len(Checkpoint(newest).manifest.shapes)
    assert checkpoint("diff", run, newest) == f"{states} state(s) are equal\n"
    shown = checkpoint("diff", run, older)
    assert "step: 12 | 8" in shown
    assert "state.data.samples_seen: 96 | 64" in shown
    assert "state.config" not in shown
    assert "token_embed.weight" in shown


def test_diff_finds_the_largest_and_the_relative_difference(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.checkpoint.differences.CHUNK", 7)
    a, b = (Checkpoint(step_path(run / "checkpoints", step)) for step in (12, 8))
    one, other = a.weights(), b.weights()
    found = {d.name: d for d in tensor_differences(a, b) if d.state == "fp32"}
    assert found.keys() == one.keys()
    for name, difference in found.items():
        change = one[name] - other[name]
        assert difference.largest == float(change.abs().max())
        norm = float(one[name].double().norm())
        assert difference.relative == pytest.approx(float(change.double().norm()) / norm, rel=1e-6)


def test_prune_keeps_what_must_stay_and_says_what_goes(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(copy)
    folder.went_on(load([str(folder.config_file), "train.keep_every=null"]), folder.facts()["dataset"])
    said = checkpoint("prune", copy, "--keep", "1", "--dry-run")
    assert said.splitlines() == [f"{step_path(copy / 'checkpoints', step)}: would be removed" for step in (4, 8)]
    assert len(checkpoint("ls", copy).splitlines()) == 3
    checkpoint("prune", copy, "--keep", "1")
    assert len(checkpoint("ls", copy).splitlines()) == 1
    assert checkpoint("prune", run, "--keep", "1") == "", "all are multiples of train.keep_every"


def test_prune_touches_neither_a_run_that_trains_nor_the_last_good_one(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    with Lease.acquire(copy), pytest.raises(RunError, match="another start owns this run folder"):
        checkpoint("prune", copy, "--keep", "1")
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]
    shard = step_path(copy / "checkpoints", 12) / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="shard-00000.safetensors: altered"):
        checkpoint("prune", copy, "--keep", "1")
    assert len(checkpoint("ls", copy).splitlines()) == 3


def test_what_a_run_removes_while_it_is_looked_at_is_no_damage(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is taken; what is open stays readable; one that is asked for is said to be gone."""
    doomed, hash_file, named = {12}, checkpoint_module.hash_file, checkpoint_folder.named

    def hash_late(file: Path) -> str:
        if step_of(file.parent) in doomed:
            remove(file.parent)
        return hash_file(file)

    monkeypatch.setattr(checkpoint_module, "hash_file", hash_late)
    copies = [shutil.copytree(run, tmp_path / name) for name in ("one", "other")]
    found, _ = find_checkpoint(copies[0])
    assert found.manifest.step == 8
    remove(found.path)
    expected = Checkpoint(step_path(run / "checkpoints", 8)).weights()
    assert all(torch.equal(values, expected[name]) for name, values in found.weights().items())
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 8; there are: 4"):
        find_checkpoint(copies[0], 8)

    doomed = {12, 8}
    root = copies[1] / "checkpoints"
    said = checkpoint("verify", copies[1])
    gone = [f"{step_path(root, step)}: removed by its run meanwhile" for step in (12, 8)]
    assert said.splitlines() == [*gone, f"{step_path(root, 4)}: whole"]

    def list_late(root: Path) -> list[Path]:
        paths = named(root)
        if not step_path(root, 12).exists():
            shutil.copytree(step_path(run / "checkpoints", 12), step_path(root, 12))
            remove(step_path(root, 4))
        return paths

    monkeypatch.setattr(checkpoint_folder, "named", list_late)
    assert RunFolder(copies[1]).saved_steps() == [12]


def change(folder: Path, edit: Callable[[dict[str, Any]], object], older: bool = False) -> None:
    """Edit a manifest as if the program had written it; `older`: in the format that had no hash and named no run."""
    content = manifest_of(folder)
    edit(content)
    write_manifest(folder, content)
    if older:
        age(folder)


def another_run(content: dict[str, Any]) -> None:
    content["state"]["run"] = "0" * 32


def another_rate(content: dict[str, Any]) -> None:
    content["state"]["config"]["optimizer"]["lr"] = 0.5


@pytest.mark.parametrize(("edit", "older"), [(another_run, False), (another_rate, True)])
def test_a_checkpoint_of_another_run_is_refused_with_the_way_on(
    run: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], older: bool
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    newest = step_path(copy / "checkpoints", 12)
    assert find_checkpoint(copy)[0].manifest.step == 12, "a run folder may be copied"
    change(newest, edit, older)
    for words in (["verify", copy], ["prune", copy, "--keep", "1"], ["export", copy, "--to", tmp_path / "new"]):
        with pytest.raises(CheckpointError, match=r"step-000000012: of another run .* duet train --from RUN@12"):
            checkpoint(*words)
    assert find_checkpoint(newest)[0].manifest.step == 12, "by its own name it is read"
    assert find_checkpoint(copy, 8)[0].manifest.step == 8
    assert not (tmp_path / "new").exists()
    if not older:
        assert checkpoint("ls", copy).splitlines()[0].endswith("of another run")


def test_a_checkpoint_of_an_older_format_is_its_runs_when_their_configurations_agree(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    age(step_path(copy / "checkpoints", 12))
    assert find_checkpoint(copy)[0].manifest.format == 3
    assert f"{step_path(copy / 'checkpoints', 12)}: whole" in checkpoint("verify", copy)


ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "samples": lambda c: c["state"]["data"].update(samples_seen=c["state"]["data"]["samples_seen"] + 8),
    "no position": lambda c: c["state"]["data"].pop("samples_seen"),
    "updates": lambda c: c.update(optimizer_steps=3000),
    "states": lambda c: c["states"].pop("token_embed.weight"),
    "fewer states": lambda c: c["states"].update({"token_embed.weight": ["fp32"]}),
    "another state": lambda c: c["states"].update({"token_embed.weight": ["fp32", "exp_avg", "other"]}),
    "a fragment": lambda c: c["shards"][0]["fragments"][0].__setitem__(0, "nobody"),
    "a shape": lambda c: c["shapes"].update({"token_embed.weight": [10**15, 10**15]}),
    "a shard less": lambda c: c["shards"].pop(),
    "another file": lambda c: c["shards"][0].update(file="../../../etc/passwd"),
    "data": lambda c: c["state"].update(data=[]),
}


@pytest.mark.parametrize("what", ODD)
def test_older_formats_are_checked_for_what_does_not_fit_together(run: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(step_path(run / "checkpoints", 12), tmp_path / "step-000000012")
    change(folder, ODD[what], older=True)
    with pytest.raises(CheckpointError, match=r"step-000000012/(manifest\.json: damaged|shard-0000\d)"):
        checkpoint("verify", folder)


@pytest.mark.parametrize("older", [False, True])
def test_whatever_a_manifest_lacks_what_reads_weights_says_it(run: Path, tmp_path: Path, older: bool) -> None:
    """A clear error for each key, never a KeyError."""
    folder = shutil.copytree(step_path(run / "checkpoints", 12), tmp_path / "one")
    if older:
        age(folder)
    raw = (folder / "manifest.json").read_text()
    for key in ("step", "states", "shapes", "shards", "fragments", "fp32", "state", "token_embed.weight", "config"):
        assert f'"{key}"' in raw
        (folder / "manifest.json").write_text(raw.replace(f'"{key}"', '"other"', 1))
        with pytest.raises(CheckpointError, match=r"one"):
            open_trained(folder)
        if key != "config":  # which a comparison does without
            with pytest.raises(CheckpointError, match=r"one"):
                checkpoint("diff", folder, run)


def test_verify_goes_on_after_a_damaged_one_and_diff_reads_nothing_that_was_altered(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    folder = step_path(copy / "checkpoints", 12)
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    done = CliRunner().invoke(app, ["checkpoint", "verify", str(copy)])
    assert done.output.splitlines() == [f"{step_path(copy / 'checkpoints', step)}: whole" for step in (8, 4)]
    assert "shard-00001.safetensors: altered" in str(done.exception)
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors: altered"):
        checkpoint("diff", folder, run)


def test_an_export_for_deepspeed_that_the_disk_refuses_leaves_nothing_in_the_way_of_the_next(
    run: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n"
        "runpy.run_module('launch.cli', run_name='__main__')\n"
    )
    refused = program("-c", limited, "checkpoint", "export", str(run), "--deepspeed", str(exported))
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, []), refused.stderr
    assert f"error: {exported}: the disk refuses what torch writes" in refused.stderr
    assert duet("checkpoint", "export", str(run), "--deepspeed", str(exported)).returncode == 0


@pytest.mark.drill
def test_export_is_read_by_deepspeeds_own_tool(ranks: Ranks, run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    done = duet("checkpoint", "export", str(run), "--deepspeed", str(exported))
    assert done.returncode == 0, done.stderr
    assert "Duet does not read this folder" in (exported / "EXPORT.txt").read_text()
    path = step_path(run / "checkpoints", 12)
    [worst] = ranks("tests.distributed.cases_checkpoint:read_export", 1, exported=str(exported), path=str(path))
    assert worst.keys() == Checkpoint(path).manifest.shapes.keys()
    assert set(worst.values()) == {0.0}
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoint("export", run, "--deepspeed", exported)
