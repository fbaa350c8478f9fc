"""`duet generate`: what it prints and writes, and a reader at a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError
from launch.cli import app
from launch.commands.generate import _show
from pretrain.inference.classification import shown
from tests.runs import SMALL, duet

Ranks = Callable[..., list[Any]]
STEPS = 20


@pytest.fixture(scope="module")
def run_dir(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    args = [*SMALL, f"data.path={dataset}", f"run.dir={folder}", f"train.steps={STEPS}"]
    ranks("tests.distributed.cases:train_run", 1, args=args)
    return folder


def generated(run_dir: Path, *args: str, given: str | None = None) -> str:
    """What `duet generate` prints, in this process."""
    done = CliRunner().invoke(app, ["generate", str(run_dir), *args], input=given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_generating_from_a_finished_run(run_dir: Path, tmp_path: Path) -> None:
    started = duet("generate", str(run_dir), "--prompt", "License", "--tokens", "20")
    assert started.returncode == 0, started.stderr
    first = started.stdout
    assert first.startswith("License")
    assert len(first) > len("License\n")
    assert generated(run_dir, "--prompt", "License", "--tokens", "20") == first
    assert generated(run_dir, "--tokens", "20", given="License\n") == first, "from standard input"
    assert generated(run_dir, "--tokens", "20", given="\ufeffLicense\n") == first, "with a byte order mark"
    several = generated(run_dir, "--prompt", "License", "--prompt", "The", "--tokens", "20")
    assert several.startswith(f"== 1 of 2 ==\n{first}== 2 of 2 ==\nThe")
    stop = re.compile("[a-z]{2}").search(first, len("License"))
    assert stop
    stopped = generated(run_dir, "--prompt", "License", "--tokens", "20", "--stop", stop[0])
    assert stopped == first[: stop.start()] + "\n"
    page = tmp_path / "new" / "page.html"
    told = generated(run_dir, "--prompt", "License", "--prompt", "", "--tokens", "20", "--json", "--html", str(page))
    one, two = (json.loads(line) for line in told.splitlines())
    assert one["prompt"] + one["text"] + "\n" == first
    assert (one["model"]["step"], two["prompt"]) == (STEPS, "")
    assert "attention" not in one
    assert {*one["density"]} == {"enc_ff/00", "dec_ff/00"}
    assert json.dumps(one["tokens"])[:-1] in page.read_text()
    nothing = generated(run_dir, "--tokens", "20", "--seed", "1")
    assert nothing == f"{two['text']}\n", "from an empty input the text begins with nothing"
    with pytest.raises(ConfigError, match="standard input: not UTF-8 at byte 1"):
        CliRunner().invoke(app, ["generate", str(run_dir)], input=b"a\xff", catch_exceptions=False)
    wrong = duet("generate", str(run_dir), "--top-p", "0")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: top_p=0.0; it is a probability above 0, up to 1\n"


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._screen, keyboard = pty.openpty()
        self.process = subprocess.Popen(
            # A shell's background job is born with SIGINT ignored.
            ["env", "--default-signal=INT", "setsid", "--ctty", *command],
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(keyboard)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C until there is an answer: one that comes just before readline waits, it sees with the next key."""
        self.type("\x03")
        while not select.select([self._screen], [], [], 1.0)[0]:
            self.type("\x03")

    def read_until(self, fits: Callable[[str], bool], timeout: float = 60) -> str:
        """What comes from now on, until it fits."""
        seen, end = "", time.monotonic() + timeout
        while not fits(seen):
            assert select.select([self._screen], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(self._screen, 4096).decode()
        return seen


def test_no_text_steers_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steering = "\x1b]0;title\x07\r\x9b2J\x7f"
    controls = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    _show([steering, "a\tb "], [(0, steering), (1, steering)])
    assert capsys.readouterr().out.count(steering) == 3, "a file has what was written"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show([steering, "a\tb "], [(0, steering), (1, steering)])
    seen = capsys.readouterr().out
    assert not controls.search(seen)
    assert "a\tb \\u001b]0;title\\u0007\\u000d\\u009b2J\\u007f\n" in seen
    stretch = {"text": steering, "label": steering, "probability": 0.5}
    for told in (stretch, {"text": steering, "tokens": [stretch]}, {"answer": steering, "probability": 0.5}):
        for as_json in (False, True):
            assert not controls.search(shown(told, as_json))
        assert json.loads(shown(told, as_json=True)) == told


def test_prompts_are_typed_at_a_terminal(run_dir: Path) -> None:
    # With SIGINT as a terminal gives it: a background job is born with it ignored.
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-P",
        "-m",
        "launch.cli",
        "generate",
        str(run_dir),
        "--greedy",
    ]
    terminal = Terminal(*command, "--tokens", "1000000")
    try:
        assert "Ctrl-D ends" in terminal.read_until(lambda seen: seen.endswith("> "))
        terminal.type("License\n")
        endless = terminal.read_until(lambda seen: len(seen) > 100)
        assert endless.startswith("License\r\nLicense")
        assert "\n> " not in endless
        terminal.type("\x03")
        terminal.read_until(lambda seen: seen.endswith("\n> "))
        terminal.type("/set tokens 0\n")
        assert "tokens=0; it is 1 or more" in terminal.read_until(lambda seen: seen.endswith("\n> "))
        terminal.type("/set tokens 3\n")
        assert "tokens=3  seed=1" in terminal.read_until(lambda seen: seen.endswith("\n> "))
        terminal.type("The\n")
        short = terminal.read_until(lambda seen: seen.endswith("\n> "))
        assert short.startswith("The\r\nThe")
        assert len(short) <= len("The\r\nThe...\r\n> ")
        terminal.interrupt()
        terminal.read_until(lambda seen: seen.endswith("\n> "))
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
