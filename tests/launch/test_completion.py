"""What Tab completes: presets, files, keys after each dot, values behind `=`; as a bash does it, too."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from launch.cli import app
from launch.completion import complete_changes, complete_configs
from launch.config_keys import dashed_key
from pretrain.config.schema import Config
from tests.runs import ROOT, duet
from tests.test_docs import key_exists


def completed(incomplete: str, *words: str) -> list[str]:
    """With these words before it."""
    context = typer.Context(typer.main.get_command(app))
    context.params = {"config": list(words)}
    return [name for name, _ in complete_configs(context, incomplete)]


def test_presets_files_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    assert completed("mi") == ["mine.yaml"]
    assert {"model/tiny", "model.width=", "model.learned_dropout."} <= {*completed("model/"), *completed("model.")}
    assert {f"{section}." for section in Config.model_fields} | {"mine.yaml", "run/quickstart"} <= {*completed("")}
    assert completed("model.learned_dropout.entropy.s") == [
        "model.learned_dropout.entropy.start_step=",
        "model.learned_dropout.entropy.start_step=1000",
    ]
    assert "data.sources.mine.text_key=" in completed("data.sources.mine.te"), "a name that the user gives"
    assert "tracking.mode=" in completed("trac"), "a single section is gone into"
    assert completed("model.nothing") == completed("nowhere.else=") == []


def test_every_key_that_is_offered_exists() -> None:
    open_ends, seen = [""], 0
    while open_ends:
        for name in completed(open_ends.pop()):
            if name.endswith("."):
                open_ends.append(name)
            elif name.endswith("="):
                seen += 1
                assert key_exists(name[:-1]), name
    assert seen > 150


def test_a_key_behind_dashes_is_known() -> None:
    assert dashed_key(["--ranks", "2", "--optimizer.lr=3e-4"]) == dashed_key(["--optimizer.lr", "3"]) == "optimizer.lr"
    assert dashed_key(["--prompt", "--optimizer.", "--a.b", "optimizer.lr=3e-4", "--run"]) is None
    said = duet("config", "show", "--optimizer.lr", "3e-4").stderr
    assert said == "error: command line: --optimizer.lr: write a key without dashes: optimizer.lr=VALUE\n"


def test_values() -> None:
    assert completed("engine.precision=") == [f"engine.precision={kind}" for kind in ("bf16", "fp32", "fp16")]
    assert completed("model.bias=t") == ["model.bias=true"]
    assert "model.architecture=decoder_only" in completed("model.arch")
    assert completed("fp", "model/tiny", "engine.precision", "=") == ["fp32", "fp16"], "as bash cuts words"
    assert completed("", "=") == completed("") and completed("b", "x", "nowhere.else", "=") == []


def test_of_a_trained_model_what_may_change() -> None:
    assert complete_changes("") == complete_changes("model.ref") == ["model.refine.steps="]
    assert complete_changes("model.width") == []


def test_every_command_that_takes_a_configuration_or_a_run_completes_it() -> None:
    def walk(command: object) -> list[Any]:
        below = getattr(command, "commands", {}).values()
        return [*getattr(command, "params", []), *(found for child in below for found in walk(child))]

    taken = [one for one in walk(typer.main.get_command(app)) if re.search("KEY=VALUE|RUN", str(one.metavar))]
    assert len(taken) >= 30
    assert [one for one in taken if one._custom_shell_complete is None] == []


def test_bash_completes_a_key_and_its_value(tmp_path: Path) -> None:
    duet = tmp_path / "duet"
    program = "import sys, duet_pretrain; sys.argv[0] = 'duet'; duet_pretrain.duet()"
    start = shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program])
    duet.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
    duet.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    asked = environment | {"_DUET_COMPLETE": "source_bash"}  # `--show-completion` looks for a shell above it
    script = subprocess.run([duet], env=asked, capture_output=True, text=True, check=True).stdout
    precision = ["duet", "train", "engine.precision", "="]
    for words in (["duet", "train", "engine.prec"], precision, [*precision, "f"]):
        script += f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _duet_completion duet\n"
        script += 'echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    key = "engine.precision="
    said = [f"{key} {key}bf16 {key}fp32 {key}fp16", "bf16 fp32 fp16", "fp32 fp16"]
    assert done.stdout.splitlines() == said, done.stderr
