"""What a user installs is enough to train with, and no more than that."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runs import ROOT, SMALL

TOP_LEVEL = {"configs", "data_pipeline", "launch", "model", "pretrain", "slurm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in TOP_LEVEL:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "duet_pretrain.py"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    [built] = folder.glob("*.whl")
    return built


def test_it_holds_presets_and_templates_and_no_other_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == TOP_LEVEL | {"duet_pretrain.py"}
    for folder, pattern in (
        ("configs", "*/*.yaml"),
        ("pretrain", "*/*.html"),
        ("pretrain", "*/*.js"),
        ("slurm", "*.sbatch"),
    ):
        shipped = {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}
        assert shipped
        assert shipped <= set(names)


def test_it_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True)
    corpus = empty / "text.txt"
    shutil.copy(ROOT / "LICENSE", corpus)

    def duet(*args: str) -> str:
        done = subprocess.run(
            [installed / "bin" / "duet", *args],
            cwd=empty,
            env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-P", "-c", "import pretrain; print(pretrain.__file__)"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(installed))
    duet("data", "build", "data/characters", "data.sources.text.paths=[text.txt]")
    summary = duet("train", "data/characters", "model/tiny", "run/quickstart", *SMALL, "train.steps=3")
    assert "step 3 of 3" in summary
    (empty / "model.py").touch()
    rank = subprocess.run(
        [installed / "bin" / "duet-rank", "data/characters", "model/tiny", "no.such.key=1"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert rank.returncode == 2
    assert rank.stderr.startswith("error: command line: unknown key no")
