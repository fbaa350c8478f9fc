"""Which folders are checkpoints, whose they are, and what becomes of the others."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import CheckpointError
from model.architectures.names import former_name
from pretrain.checkpoint import retention
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.engine.engine import Fragment
from pretrain.run import checkpoint_folder
from pretrain.run.checkpoint_folder import complete, make_room, remove, step_of, step_path
from pretrain.run.run_listing import saved_steps
from tests.checkpoints import manifest_of, write_manifest
from tests.pretrain.checkpoint.test_retention import make, steps

ODD = ("step-000000020.bak", "step-000000020.tar", "step-", "step-x", "step--00000001", "step-20", "step-٠٠٠٠٠٠٠٢٠")


def clutter(root: Path) -> None:
    """All that can be called `step-…` and is no checkpoint."""
    for name in ODD:
        shutil.copytree(step_path(root, 10), root / name)
    (root / "step-000000030").write_text("a file")
    (root / "step-000000040").symlink_to("nowhere")
    (root / "step-000000050").symlink_to("step-000000050")
    shutil.copytree(step_path(root, 10), step_path(root, 60))


def test_what_is_no_checkpoint_of_its_step_is_passed_over_by_all_that_look(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (5, 10):
        make(root, step)
    clutter(root)
    before = sorted(root.iterdir())
    warnings: list[str] = []
    assert [step_of(path) for path in complete(root, warnings.append)] == [10, 5]
    told = ("step-000000030", "step-000000040", "step-000000050", "step-000000060")
    assert len(warnings) == len(told)
    assert all(any(name in text for text in warnings) for name in told)
    assert saved_steps(tmp_path) == [5, 10]
    assert all(step_of(root / name) is None for name in ODD)
    assert retention.prune(root, 1, None) == [step_path(root, 5)], "the stale copy is not the newest"
    assert sorted(root.iterdir()) == [path for path in before if path.name != "step-000000005"]
    with pytest.raises(CheckpointError, match="its manifest is of step 10"):
        Checkpoint(step_path(root, 60))


def test_of_a_link_only_the_link_goes(tmp_path: Path) -> None:
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    for step in (1, 2):
        make(root, step)
    kept = shutil.move(step_path(root, 1), archive)
    step_path(root, 1).symlink_to(kept)
    assert retention.prune(root, 1, None) == [step_path(root, 1)]
    assert steps(root) == [2]
    assert Checkpoint(archive).manifest.step == 1
    for name in ("dangling", "file", "missing"):
        path = tmp_path / name
        if name == "dangling":
            path.symlink_to("nowhere")
        elif name == "file":
            path.touch()
        remove(path)
        assert not os.path.lexists(path)


def test_what_stands_where_a_step_is_saved_goes_or_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    archive = make(tmp_path / "archive", 3)
    step_path(tmp_path, 1).symlink_to(archive)
    step_path(tmp_path, 2).symlink_to("nowhere")
    step_path(tmp_path, 3).touch()
    shutil.copytree(make(tmp_path, 5), step_path(tmp_path, 4))
    make(tmp_path, 6)
    for step in (2, 3, 5, 7):
        make_room(step_path(tmp_path, step), warnings.append)
    assert warnings == []
    make_room(step_path(tmp_path, 1), warnings.append)
    make_room(step_path(tmp_path, 4), warnings.append)
    monkeypatch.setattr(checkpoint_folder, "remove", refuse)
    make_room(step_path(tmp_path, 6), warnings.append)
    assert not [path for path in tmp_path.iterdir() if step_of(path)]
    assert len(warnings) == len(list(tmp_path.glob("step-*.*"))) == 3
    assert Checkpoint(archive).manifest.step == 3


def refuse(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_what_cannot_be_removed_does_not_keep_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    rmtree = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name.endswith("1"):
            raise OSError(39, "Directory not empty", str(path))  # NFS, where a file is still open
        rmtree(path)

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", busy)
    with pytest.raises(CheckpointError, match="step-000000001: could not be removed"):
        retention.prune(tmp_path, 1, None)
    assert steps(tmp_path) == [1, 3]
    monkeypatch.undo()
    assert retention.prune(tmp_path, 1, None) == [step_path(tmp_path, 1)], "the next one tries again"


def test_what_a_start_passed_over_does_not_count_against_what_it_saved(tmp_path: Path) -> None:
    """The newest has damaged shards, which retention does not read; the run has gone on from the one before."""
    for step in (1, 2, 9):
        make(tmp_path, step)
    assert retention.prune(tmp_path, 1, None, upto=2) == [step_path(tmp_path, 1)]
    assert steps(tmp_path) == [2, 9]


def test_another_runs_checkpoint_neither_counts_nor_goes(tmp_path: Path) -> None:
    for step, run in ((1, "ours"), (2, "theirs"), (3, "ours"), (4, "theirs")):
        content = manifest_of(make(tmp_path, step, loss=1.0 / step))
        write_manifest(step_path(tmp_path, step), content | {"state": {"run": run}})
    assert retention.prune(tmp_path, 1, None, "ours") == [step_path(tmp_path, 1)]
    assert steps(tmp_path) == [2, 3, 4]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "no UTF-8": lambda raw: raw.replace(b'"step"', b'"st\xffp"'),
    "nested deeply": lambda raw: b"[" * 200_000,
    "a number of 5,000 digits": lambda raw: raw.replace(b'"step":7', b'"step":' + b"7" * 5000),
    "infinite": lambda raw: raw.replace(b'"optimizer_steps":7', b'"optimizer_steps":1e999'),
    "not an object": lambda raw: b"[]",
    "empty": lambda raw: b"",
    "another optimizer_steps": lambda raw: raw.replace(b'"optimizer_steps":7', b'"optimizer_steps":8'),
    "no hash": lambda raw: raw[: raw.rfind(b",")] + b"\n}",
    "another format": lambda raw: raw.replace(b'"format":4', b'"format":3'),
    "no states": lambda raw: raw.replace(b'"states"', b'"state_"'),
    "written anew": lambda raw: json.dumps(json.loads(raw)).encode(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_manifest_that_was_altered_is_damage(tmp_path: Path, how: str) -> None:
    file = make(tmp_path, 7) / "manifest.json"
    raw = BROKEN[how](file.read_bytes())
    assert raw != file.read_bytes()
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Checkpoint(file.parent)
    assert complete(tmp_path) == [file.parent], "who looks for the newest opens it, and warns"
    assert retention.reasons(tmp_path, 1, None) == {file.parent: ["cannot be read"]}


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    file = make(tmp_path, 7) / "manifest.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a file"):
        Checkpoint(file.parent)


LOOK = """
import sys
from pathlib import Path
from data_pipeline.errors import CheckpointError
from pretrain.run.checkpoint_folder import complete, read_manifest
try:
    [path] = complete(Path(sys.argv[1]))
    read_manifest(path)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("closed", ["checkpoints/step-000000007", "checkpoints/step-000000007/manifest.json"])
def test_what_may_not_be_read_is_said(tmp_path: Path, closed: str) -> None:
    make(tmp_path / "checkpoints", 7)
    assert "cannot be read: Permission denied" in refused(tmp_path, tmp_path / closed)


def test_a_folder_of_checkpoints_that_may_not_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", 7)
    assert "checkpoints: cannot be listed: Permission denied" in refused(tmp_path, tmp_path / "checkpoints")


def refused(run_dir: Path, closed: Path) -> str:
    """What a look at a run's newest checkpoint says when a path of it may not be read, by root neither."""
    command = [sys.executable, "-c", LOOK, str(run_dir / "checkpoints")]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and setpriv is not there to take that away")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    mode = closed.stat().st_mode
    closed.chmod(0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        closed.chmod(mode)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", [1, 2, 3])
def test_older_formats_are_read_as_they_were_written(number: int) -> None:
    """Written by the versions that had them; the hashes are those of the engine that saved."""
    folder = Path(__file__).parents[1] / "checkpoints" / f"format{number}"
    found = Checkpoint(step_path(folder, 2))
    found.verify()
    assert found.manifest.format == number
    assert digests(found) == json.loads((folder / "digest.json").read_text())


def digests(found: Checkpoint) -> dict[str, Any]:
    """Of each kind of state the hash over the parameters, in the order of the names that they had then."""
    kinds = {state for states in found.manifest.states.values() for state in states}
    hashes = {kind: hashlib.sha256() for kind in kinds}
    for name, shape in sorted(found.manifest.shapes.items(), key=lambda item: former_name(item[0])):
        values = {kind: torch.empty(math.prod(shape)) for kind in kinds}
        found.read(Fragment(name, 0, math.prod(shape), values))
        for kind, tensor in values.items():
            hashes[kind].update(former_name(name).encode() + tensor.numpy().tobytes())
    return {kind: digest.hexdigest() for kind, digest in hashes.items()}
