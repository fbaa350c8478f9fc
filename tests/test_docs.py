"""The documents do what they say: their commands run, their links lead somewhere, their names exist."""

import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from launch.cli import app
from model.architectures.registry import ARCHITECTURES
from pretrain.config.schema import Config
from tests import warm
from tests.runs import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUE_THE_README = {
    "after.md",
    "training.md",
    "tracking.md",
    "commands.md",
    "checkpoints.md",
    "engine.md",
    "generate.md",
    "use.md",
    "study.md",
    "tutorial.md",
    "your-architecture.md",
}
"""They say that their examples continue with the data and the run of the README."""
RUN_ELSEWHERE = {
    "make quickstart": ".ci/run",
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "make lint": ".ci/run",
    "make drills": "by hand",
    "make gpu": "a GPU; tests/gpu/test_rehearsal.py",
    'make gpu ARGS="--device cpu"': "by hand: six minutes; tests/gpu/test_rehearsal.py",
    "python .ci/make_wheels.py wheels --python 3.12": "by hand: it downloads",
    "git clone REPOSITORY duet && cd duet": "before anything else",
    ".venv/bin/pre-commit install": "writes into .git",
    "pytest tests/test_architecture.py": "this session",
    "pytest tests/model/masks/test_losses.py": "this session",
    "pytest tests/pretrain -k lease": "this session",
    "python docs/make_config_reference.py": "test_the_configuration_reference_is_up_to_date",
    "duet quickstart": ".ci/run",
    "pip install duet_pretrain-0.1.0-py3-none-any.whl": "tests/test_wheel.py",
    "duet train runs/first/config.yaml --ranks 2": "tests/test_end_to_end.py",
    "RANK=0 WORLD_SIZE=1 duet-rank runs/first/config.yaml": "what `duet train` starts",
    "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db": "a server",
    "torchrun --nproc-per-node 8 --no-python duet-rank model/tiny run/quickstart data.path=data/mine run.name=wide": (
        "8 GPUs"
    ),
    "srun --kill-on-bad-exit=1 duet-rank model/tiny run/quickstart data.path=data/mine run.name=wide": "Slurm",
    "bash slurm/tokenize.sbatch 32 mine.yaml data.path=data/shared": "tests/slurm/test_tokenize.py",
    "duet data upload data/mine s3://bucket/mine": "tests/data_pipeline/storage/test_remote.py",
    "duet checkpoint shrink runs/gated --gates --to smaller": "tests/pretrain/export/smaller/test_gates.py",
    "duet checkpoint import SmolLM-135M --to imported": "docs/after.md, with a model of ours",
    "duet train run/quickstart --from imported data.path=data/own run.name=tuned": "tests/pretrain/test_finetune.py",
    "duet cancel runs/first": "tests/slurm/test_status.py",
    "duet requeue runs/first": "tests/slurm/test_status.py",
    "duet resume runs/first --nodes 4": "tests/slurm/test_status.py",
    "sbatch slurm/pretrain.sbatch model/tiny run/quickstart data.path=data/mine run.dir=runs/wide": "Slurm",
}
"""Commands that are not run here, and where they are."""

FENCE = re.compile(r"^```(\w*(?: \w+)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""`bash` is run here, `bash slurm` on a cluster by tests/slurm/test_documents.py."""
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})(?:\.\w+)+(?![\w/(-])")
IMPORT = re.compile(r"(?m)^ *(?:from|import) .*$")
FILE_ENDINGS = {"json", "yaml", "md", "py", "safetensors"}


def scripts(document: Path, done: Collection[str] = ()) -> list[str]:
    """What is to be run of each bash block."""
    blocks = [text for kind, text in FENCE.findall(document.read_text()) if kind == "bash"]
    skipped = RUN_ELSEWHERE.keys() | {line for line in done if line.startswith("duet ")}  # no line of a program's text
    kept = ("\n".join(line for line in text.splitlines() if line not in skipped) for text in blocks)
    return [script for script in kept if script.strip()]


def run_commands(
    document: Path, folder: Path, done_before: Collection[str] = (), programs: Path = Path(sys.executable).parent
) -> None:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    shutil.copy(ROOT / "LICENSE", folder)
    for script in scripts(document, done_before):
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{document.name}, exit code {done.returncode}:\n{done.stdout}"
        assert "Traceback" not in done.stdout, f"{document.name}:\n{done.stdout}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH in which `duet` is the real program, but for its start."""
    folder = tmp_path_factory.mktemp("programs")
    duet = folder / "duet"
    duet.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {warm.__file__} launch.cli "$@"\n')
    duet.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def done_before() -> set[str]:
    """Commands that have run in the README's folder or in a copy of it: once is enough."""
    return set()


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, done_before: set[str]) -> Path:
    """A folder in which the README's commands have run, each in a new process."""
    folder = tmp_path_factory.mktemp("readme")
    run_commands(ROOT / "README.md", folder)
    done_before |= {line for script in scripts(ROOT / "README.md") for line in script.splitlines()}
    return folder


def test_the_commands_of_the_readme_run(after_readme: Path) -> None:
    assert (after_readme / "runs" / "first" / "report.png").is_file()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS[1:] if scripts(d)], ids=lambda d: d.name)
def test_the_commands_run(
    document: Path, tmp_path: Path, request: pytest.FixtureRequest, done_before: set[str], programs: Path
) -> None:
    folder = tmp_path / "folder"
    if document.name in CONTINUE_THE_README:
        shutil.copytree(request.getfixturevalue("after_readme"), folder)
        for known in folder.glob(
            "runs/*/tracking.json"
        ):  # it tells that the folder is a copy, which has no run of its own
            known.unlink()
        run_commands(document, folder, done_before, programs)
        done_before |= {line for script in scripts(document) for line in script.splitlines()}
    else:
        folder.mkdir()
        run_commands(document, folder, programs=programs)


def test_a_command_that_fails_is_noticed(tmp_path: Path, programs: Path) -> None:
    document = tmp_path / "broken.md"
    document.write_text("```bash\nduet config show train.stpes=3\ntrue\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)exit code 2.*nearest valid key: train\.steps"):
        run_commands(document, tmp_path, programs=programs)


def test_the_list_of_commands_run_elsewhere_holds_no_others() -> None:
    lines = {line for d in DOCUMENTS for _, text in FENCE.findall(d.read_text()) for line in text.splitlines()}
    assert set(RUN_ELSEWHERE) <= lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [t for t in LINK.findall(document.read_text()) if not t.startswith(("https://", "#"))]
    assert [t for t in targets if not (document.parent / t.partition("#")[0]).exists()] == []


@functools.cache
def commands() -> dict[str, set[str]]:
    """Every command and the options it has: {"data build": {"--overwrite", …}}."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
        children = getattr(command, "commands", None)
        if children is None:
            options = {o for p in command.params for o in p.opts if o.startswith("--")}  # type: ignore[attr-defined]
            yield " ".join(words), options - {"--help"}
        for name, child in (children or {}).items():
            yield from walk(child, (*words, name))

    return dict(walk(typer.main.get_command(app), ()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_duet_command_exists(document: Path) -> None:
    text = document.read_text()
    code = [*(body for _, body in FENCE.findall(text)), *CODE.findall(FENCE.sub("", text))]
    groups = {name.split()[0] for name in commands() if " " in name}
    wrong = []
    for first, second in re.findall(r"(?m)(?:^|[ /])duet +([a-z]\w*)(?: +([a-z]\w*))?", "\n".join(code)):
        if first not in groups:
            second = ""
        if f"{first} {second}".strip() not in commands():
            wrong.append(f"duet {first} {second}")
    assert wrong == []


def test_every_command_is_documented_with_its_options_and_an_example() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    sections = dict(re.findall(r"(?ms)^## duet ([a-z ]+)\n(.*?)(?=^## |\Z)", text))
    assert sections.keys() == commands().keys()
    for name, options in commands().items():
        assert set(re.findall(r"^\| `(--[a-z-]+)`", sections[name], re.MULTILINE)) == options, name
        assert any(f"duet {name}" in body for kind, body in FENCE.findall(sections[name]) if kind == "bash"), name


def key_exists(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "model" and rest:
        return any(_leads(kind, rest) for kind in ARCHITECTURES.values())
    return _leads(Config, key)


def _leads(kind: object, key: str) -> bool:
    for part in key.split("."):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part not in kind.model_fields:
                return False
            kind = kind.model_fields[part].annotation
        elif getattr(kind, "__origin__", None) is dict:
            kind = kind.__args__[1]  # type: ignore[attr-defined]
        else:
            return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_configuration_key_exists(document: Path) -> None:
    text = document.read_text()
    code = [*(body for kind, body in FENCE.findall(text) if kind != "python"), *CODE.findall(FENCE.sub("", text))]
    keys = {key for part in code for key in KEY.findall(IMPORT.sub("", part))}
    wrong = {key for key in keys if key.rpartition(".")[2] not in FILE_ENDINGS and not key_exists(key)}
    # The mistake that troubleshooting.md shows, and a key of the architecture in your-architecture.md.
    assert wrong - {"train.stpes", "model.forget"} == set()


def test_a_wrong_key_is_noticed() -> None:
    assert KEY.findall("set train.steps=3, data.sources.mine.paths and model.nothing") == [
        "train.steps",
        "data.sources.mine.paths",
        "model.nothing",
    ]
    assert key_exists("data.sources.mine.paths")
    assert not key_exists("model.nothing")
    assert not key_exists("train.steps.more")


def test_the_configuration_reference_is_up_to_date() -> None:
    program = ROOT / "docs" / "make_config_reference.py"
    expected = runpy.run_path(str(program))["reference"]()
    assert (ROOT / "docs" / "config.md").read_text() == expected, f"run: python {program.relative_to(ROOT)}"


def test_what_the_code_cites_of_the_specification_is_there() -> None:
    labels = set(re.findall(r"(?m)^#+ ([A-Z]\d*)\.", (ROOT / "docs" / "model.md").read_text()))
    cited = set()
    for room in ("model", "pretrain", "tests"):
        for file in (ROOT / room).rglob("*.py"):
            for found in re.findall(r"docs/model\.md ([A-Z]\d*(?:(?:, |-)[A-Z]\d+)*)", file.read_text()):
                cited |= set(re.findall(r"[A-Z]\d*", found))
    assert cited
    assert cited <= labels


def test_no_picture_is_large() -> None:
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert [p.name for p in pictures if p.stat().st_size > 300_000] == []
