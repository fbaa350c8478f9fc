"""Every small preset learns as it did when its curve was recorded."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.shard_file import hash_file
from pretrain.inference.trained import find_checkpoint
from tests import golden, warm
from tests.checkpoints import manifest_of, write_manifest
from tests.golden import FOLDER, STEPS, WARM_UP_STEPS, data_of, golden_file, small_presets
from tests.runs import CHARACTERS, MARKED, ROOT, SMALL
from tests.versions import COMPARED, checked_out, differences, duet_of

TOLERANCE = 1e-3
"""Instructions other than those of the recording (AVX2 for AVX-512) leave curves at most 0.0006 apart."""


@pytest.mark.parametrize("steps", [WARM_UP_STEPS + 2, pytest.param(STEPS, marks=pytest.mark.drill)])
def test_each_small_preset_follows_its_golden_curve(
    ranks: Callable[..., list[Any]], dataset: Path, marked_dataset: Path, steps: int
) -> None:
    names = small_presets(dataset)
    assert {golden_file(name) for name in names} == set(FOLDER.glob("*.json")), "run `python -m tests.golden`"
    datasets = {CHARACTERS: dataset, MARKED: marked_dataset}
    for name in names:
        [losses] = ranks("tests.golden:curve", 1, preset=name, dataset=str(datasets[data_of(name)]), steps=steps)
        expected = json.loads(golden_file(name).read_text())[:steps]
        assert losses == pytest.approx(expected, abs=TOLERANCE), name
        assert min(losses) < losses[0] - 0.5, f"{name} does not learn"


def test_another_seed_leaves_the_golden_curve(ranks: Callable[..., list[Any]], dataset: Path) -> None:
    """The comparison can fail: other first weights are far away."""
    [losses] = ranks("tests.golden:curve", 1, preset="model/tiny", dataset=str(dataset), seed=1, steps=5)
    expected = json.loads(golden_file("model/tiny").read_text())[:5]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 50 * TOLERANCE


def test_the_script_has_a_session_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In which it builds data as tests do; the folder of one that was killed is removed."""
    killed = tmp_path / "duet-warm-killed"
    killed.mkdir()
    with subprocess.Popen("true") as program:
        (killed / "session").write_text(str(program.pid))
    seen = list[Path]()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["golden"])
    monkeypatch.setattr(golden, "write_all", lambda: seen.extend(tmp_path.iterdir()))
    monkeypatch.setenv(warm.FOLDER, "none")
    assert golden.main() == 0
    assert [str(folder) for folder in seen] == [os.environ[warm.FOLDER]]
    assert not any(tmp_path.iterdir())


def test_the_comparison_of_versions_sees_any_difference(
    ranks: Callable[..., list[Any]], dataset: Path, tmp_path: Path
) -> None:
    """`--against` is told nothing where runs are the same, and all that differs where a seed or one moment does."""
    runs = [tmp_path / name for name in ("one", "again", "other")]
    for run, seed in zip(runs, (1, 1, 2), strict=True):
        args = [*SMALL, f"data.path={dataset}", f"run.dir={run}", f"run.seed={seed}", "train.steps=3"]
        ranks("tests.distributed.cases:train_run", 1, args=args)
    one, again, other = runs
    assert differences(one, again) == []
    told = differences(one, other)
    assert {line.partition(":")[0] for line in told} >= set(COMPARED)
    assert any("token_embed.weight exp_avg" in line for line in told)
    checkpoint, _ = find_checkpoint(again)
    shard = checkpoint.path / "shard-00000.safetensors"
    tensors = load_file(shard)
    tensors["exp_avg"].view(torch.int32)[-1] ^= 1
    save_file(tensors, shard)
    manifest = manifest_of(checkpoint.path)
    manifest["shards"][0] |= {"xxh3_128": hash_file(shard), "bytes": shard.stat().st_size}
    write_manifest(checkpoint.path, manifest)
    [line] = differences(one, again)
    assert "exp_avg: by up to" in line


def test_another_version_is_the_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    with pytest.raises(SystemExit, match="AssertionError"):
        duet_of(tmp_path, "--help")  # the other packages would be the installed ones
    with pytest.raises(SystemExit, match="no-such-commit: git has no such commit here"):
        checked_out("no-such-commit", tmp_path / "older")
    duet_of(ROOT, "config", "presets")
