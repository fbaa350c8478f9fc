"""What ends a command: a user's mistake and a path that the system refuses are one line, a bug is a traceback."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest

import duet_pretrain
from launch import cli

LONG = "x" * 300
"""Longer than a name can be."""


def ended(monkeypatch: pytest.MonkeyPatch, *args: str, encoding: str = "utf-8") -> tuple[int, str]:
    """Exit code and what is printed, at a terminal of this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "argv", ["duet", *args])
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as end:
        cli.main()
    for stream in streams:
        stream.flush()
    return int(end.value.code or 0), b"".join(stream.buffer.getvalue() for stream in streams).decode(encoding)


@pytest.mark.parametrize(
    "args",
    [
        ("data", "inspect", LONG),
        ("eval", LONG),
        ("generate", LONG, "--prompt", "a"),
        ("report", LONG),
        ("runs", "ls", LONG),
        ("checkpoint", "ls", LONG),
        ("status", LONG),
    ],
)
def test_a_name_that_is_too_long_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    code, told = ended(monkeypatch, *args)
    assert code == 2
    assert told.startswith(f"error: {LONG}")
    assert told.endswith("the name is too long\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_a_terminal_cannot_show_is_spelt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str) -> None:
    (tmp_path / os.fsdecode(b"run\xff") / "attempts").mkdir(parents=True)
    (tmp_path / os.fsdecode(b"run\xff") / "run.json").write_text("{}")
    code, told = ended(monkeypatch, "runs", "ls", str(tmp_path), encoding=encoding)
    assert code == 0
    assert (r"run\udcff" if encoding == "utf-8" else "run?") in told


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*args: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path))

    monkeypatch.setattr("pretrain.report.report.write_report", failing)
    with pytest.raises(FileNotFoundError):
        ended(monkeypatch, "report", str(tmp_path))


def test_ctrl_c_while_all_is_imported_is_no_bug(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(duet_pretrain, "_check_all", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        duet_pretrain.duet()
    assert end.value.code == 130 and capfd.readouterr().err == ""
