"""Files of a user's that are called as our packages are: they do no harm, or the first line names them."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.runs import ROOT, SMALL

OWN = "raise RuntimeError('the user has a file of this name')\n"
SCRIPT = "from duet_pretrain import {0}\n\nif __name__ == '__main__':\n    {0}()\n"
"""What pip makes of an entry of [project.scripts]."""


def run(folder: Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python in this folder, where nothing but its own way of starting tells it where to look."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of somebody's: files and folders with our names, and a corpus."""
    own = tmp_path / "project"
    own.mkdir()
    for name in ("model.py", "launch.py", "data_pipeline.py"):
        (own / name).write_text(OWN)
    for name in ("configs/model", "slurm", "pretrain"):  # of weights, say
        (own / name).mkdir(parents=True)
    (own / "configs" / "__init__.py").write_text(OWN)
    lines = (ROOT / "LICENSE").read_text().split("\n\n")
    (own / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (own / "filters.py").write_text("def keep(text, record):\n    return 'Derivative' not in text\n")
    for name in ("duet", "rank"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(SCRIPT.format(name))
    return own


def test_files_of_a_user_do_no_harm_where_the_user_is(folder: Path) -> None:
    duet, rank = folder.parent / "bin" / "duet", folder.parent / "bin" / "rank"
    sources = [  # two, so that there is work for two processes
        f"data.sources.{name}.{rest}"
        for name in ("text", "same")
        for rest in ("paths=[text.jsonl]", "filter.function=filters.py:keep")
    ]
    done = run(folder, duet, "data", "build", "data/characters", *sources, "data.path=data", "--processes", "2")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert all(source["dropped"]["function"] > 0 for source in manifest["sources"])
    settings = ["model/tiny", "run/quickstart", *SMALL, "data.path=data", "run.name=own"]
    done = run(folder, duet, "train", *settings, "train.steps=2")  # by `-P -m pretrain`
    assert "step 2 of 2" in done.stdout, done.stderr
    torchrun = ["-P", "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable]
    done = run(folder, *torchrun, rank, *settings, "train.steps=3", "run.name=second")
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3" in done.stdout


@pytest.mark.parametrize("own", ["model.py", "launch.py", "pretrain/__init__.py", "data_pipeline/mine.txt"])
@pytest.mark.parametrize("start", [["duet", "config", "presets"], ["rank", "model/tiny"]], ids=["duet", "duet-rank"])
def test_a_console_script_names_what_stands_in_its_way(tmp_path: Path, own: str, start: list[str]) -> None:
    program, *words = start
    (tmp_path / program).write_text(SCRIPT.format(program))
    theirs = tmp_path / "theirs"
    (theirs / own).parent.mkdir(parents=True)
    (theirs / own).write_text(OWN)
    done = run(tmp_path, program, *words, PYTHONPATH=str(theirs))
    name, file = own.split("/")[0], own.removesuffix("/mine.txt")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {name.removesuffix('.py')} is {theirs / file} here, not Duet's package of that name: "
        f"take {theirs} out of PYTHONPATH, or rename {name}\n"
    )


@pytest.mark.parametrize("module", ["pretrain", "launch.cli", "launch.slurm.fit", "launch.slurm.policy"])
def test_a_module_of_ours_names_what_stands_in_its_way(tmp_path: Path, module: str) -> None:
    (tmp_path / "model.py").write_text(OWN)
    done = run(tmp_path, "-m", module, "--help")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: model is {tmp_path}/model.py here, not Duet's package of that name: rename model.py, or start with "
        "`python -P`, which leaves this folder out\n"
    )
    assert "model.py" not in run(tmp_path, "-P", "-m", module, "--help").stderr


def test_a_script_of_a_user_is_told_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "model.py").touch()
    for line in ("import pretrain.trainer", "import launch.cli", "import model, pretrain"):
        script.write_text(line + "\n")
        done = run(Path("/"), script)
        assert done.stderr.splitlines()[-1].startswith(
            f"duet_pretrain.NameTaken: model is {tmp_path}/model.py here, not Duet's package of that name: rename "
        )
    script.write_text("import data_pipeline.storage.dataset\n")  # which has no need of a model
    assert run(Path("/"), script).returncode == 0
    script.write_text("import pretrain, model.config\nprint(model.__file__)\n")
    (tmp_path / "model.py").unlink()
    assert run(Path("/"), script).stdout == f"{ROOT}/model/__init__.py\n"


def test_another_package_and_another_path_are_told_apart(tmp_path: Path) -> None:
    for place, message in (
        ("site-packages", "another installed package brings it; install Duet into an environment of its own"),
        ("elsewhere", f"take {tmp_path}/elsewhere out of sys.path, or rename model"),
    ):
        package = tmp_path / place / "model"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        done = run(tmp_path, "-P", "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r}); import pretrain")
        assert done.stderr.splitlines()[-1].endswith(f"model is {package}/__init__.py here, not Duet's package of that "
            f"name: {message}")  # fmt: skip


def test_batch_scripts_start_what_there_is_and_look_nowhere_else() -> None:
    found = set()
    for script in (ROOT / "slurm").glob("*.sbatch"):
        text = script.read_text()
        assert 'python+=("$DUET_PYTHON" -P -m)' in text
        found |= set(re.findall(r'"\$\{python\[@\]\}" ([a-z][\w.]*)', text))
    assert len(found) == 6
    assert all(find_spec(name) for name in found)
