"""The terminal: aligned lines, nothing but text in a file."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.tracking.console import HEADER_EVERY, Console
from pretrain.tracking.durations import duration
from tests.conftest import ROOT

METRICS = {
    "loss/total": 5.6,
    "loss/train": 5.5,
    "penalty/entropy": 2e-5,
    "gate/density": 0.75,
    "gate/density/enc_ff/00": 0.7,
    "optim/grad_norm": 1.25,
    "optim/lr": 3e-4,
    "time/tokens_per_second": 45678.9,
    "system/memory_gib": 1.5,
}


def test_a_file_gets_plain_lines_that_align_and_one_header() -> None:
    file = io.StringIO()
    with Console(2000, file) as console:
        for step in range(1, 3 * HEADER_EVERY):
            console.step(step, METRICS)
        console.step(1999, METRICS | {"optim/grad_norm": float("nan"), "loss/train": 123.45678})
    text = file.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines].count("step") == 1
    assert lines[0].split() == ["step", "loss", "ce", "entropy", "density", "grad", "lr", "tok/s", "GiB", "left"]
    values = ["1/2000", "5.6000", "5.5000", "2.00e-05", "0.7500", "1.250", "3.00e-04", "45,679", "1.50", "-"]
    assert lines[1].split() == values
    assert "nan" in lines[-1]


def test_new_metrics_bring_a_new_header() -> None:
    file = io.StringIO()
    console = Console(10, file)
    console.step(1, {"loss/train": 1.0})
    console.step(2, {"loss/train": 1.0, "optim/lr": 0.1})
    assert [line.split()[0] for line in file.getvalue().splitlines()] == ["step", "1/10", "step", "2/10"]


def test_a_long_validation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pretrain.tracking.console.time.monotonic", lambda: clock[0])
    file = io.StringIO()
    console = Console(100, file)
    for done in range(8):
        console.validating(50, done, 8)
        clock[0] += 4.0
    assert [line.split() for line in file.getvalue().splitlines()] == [
        ["50/100", "validation", "38%", "20s", "left"],
        ["50/100", "validation", "75%", "8s", "left"],
    ]


def test_validation_note_warning_summary() -> None:
    file = io.StringIO()
    console = Console(100, file)
    flips = {"gate/flips": 0.25, "gate/flips/enc_ff/00": 0.25}
    sources = {"loss/val/web": 2.4, "loss/val_bits_per_byte/web": 1.2}
    losses = {"loss/val": 2.5, "loss/val_bits_per_byte": 1.25, "gate/val_density": 0.5}
    console.validation(50, losses | sources | flips)
    console.note("resumed from step 40")
    console.warning("MLflow is away")
    console.warning("MLflow is away")
    console.summary([(f"row{i}", f"text {i}") for i in range(12)])
    lines = file.getvalue().splitlines()
    assert lines[:3] == [
        " 50/100  validation   loss 2.5000   bits per byte 1.2500   density 0.5000   flips 0.2500",
        "resumed from step 40",
        "warning: MLflow is away",
    ]
    assert lines[4:] == [f"row{i}  text {i}" for i in range(10)]


def test_text_cannot_steer_the_terminal_and_an_ascii_file_takes_it() -> None:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="ascii")
    Console(1, file).note("\x1b[31mred\rover [bold]x[/bold] → ü")
    assert buffer.getvalue() == b"\\x1b[31mred\\rover [bold]x[/bold] \\u2192 \\xfc\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (187, "3m07s"), (3599.6, "1h00m"), (7500, "2h05m"), (385_200, "4d11h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_gets_colour_a_status_line_and_its_cursor_back() -> None:
    script = (
        "import sys; from pretrain.tracking.console import Console\n"
        "with Console(100) as console:\n"
        "    for step in range(1, 46): console.step(step, {'loss/train': float('nan') if step == 44 else 2.0})\n"
        "    console.note('half way')\n"
    )
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=child, env=environment)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 1 << 16):
            output += chunk
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    text = output.decode()
    assert "45%" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.count("   ce     left\r\n") == 3, "a header again every 20 lines"
    assert "half way" in plain
    assert "\x1b[1;31m" in text, "a loss that is not finite is red"


def test_the_time_left_comes_from_the_last_lines_and_from_the_step_time_at_the_first() -> None:
    file = io.StringIO()
    with Console(100, file) as console:
        console.step(10, {"time/step_ms": 2000.0})
    assert file.getvalue().splitlines()[-1].split() == ["10/100", "3m00s"]


NOISY = """
import ctypes, os, sys, warnings
from pathlib import Path
from pretrain.tracking.console import Console, fail, take_over
rank = int(sys.argv[2])
take_over(Path(sys.argv[1]), rank, verbose=sys.argv[3] == "verbose")
print("python noise")
warnings.warn("a library's warning")
libc = ctypes.CDLL(None)
libc.puts(b"C noise")
libc.fflush(None)
if rank == 0:
    console = Console(10)
    for step in (1, 2):
        console.step(step, {"loss/train": 2.0})
        os.system("echo noise of a child")
    fail("error: a mistake")
raise RuntimeError("the end")
"""


def noisy(logs: Path, rank: int, mode: str) -> tuple[str, str, str]:
    """What a real process prints to the screen and into its log: (output, error stream, log)."""
    command = [sys.executable, "-c", NOISY, str(logs), str(rank), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stdout, done.stderr, (logs / f"rank-{rank}.log").read_text()


def test_rank_0_shows_its_own_words_and_one_line_about_the_noise(tmp_path: Path) -> None:
    output, errors, log = noisy(tmp_path / "logs", 0, "quiet")
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["warning:", "step", "1/10", "2/10"]
    assert lines[0].startswith(f"warning: the libraries' own messages are in {tmp_path}/logs/rank-0.log;")
    assert errors.splitlines()[0] == "error: a mistake"
    assert errors.splitlines()[-1] == "RuntimeError: the end", "a bug keeps its traceback"
    for line in lines + errors.splitlines():
        assert line in log.splitlines(), "the log is a plain copy"
    for noise in ("python noise", "a library's warning", "C noise", "noise of a child"):
        assert noise in log
        assert noise not in output + errors


def test_verbose_shows_the_noise(tmp_path: Path) -> None:
    output, errors, log = noisy(tmp_path / "logs", 0, "verbose")
    assert [n for n in ("python noise", "C noise", "noise of a child") if n not in output] == []
    assert "a library's warning" in errors
    assert "messages are in" not in output
    assert [line for line in log.splitlines() if "noise" in line] == []
    assert "2/10" in log


@pytest.mark.parametrize("mode", ["quiet", "verbose"])
def test_other_ranks_are_in_their_logs_only(tmp_path: Path, mode: str) -> None:
    output, errors, log = noisy(tmp_path / "logs", 1, mode)
    assert output == errors == ""
    assert "python noise" in log
    assert log.endswith("RuntimeError: the end\n")
