"""Progress of counted work, off a terminal and on one."""

import os
import pty
import sys
from contextlib import suppress

import pytest

from launch.progress import counted


def test_a_file_gets_a_line_every_ten_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("launch.progress.time.monotonic", lambda: clock[0])
    with counted("validating") as progress:
        for done in range(8):
            progress(done, 8)
            clock[0] += 4.0
    assert capsys.readouterr().err.splitlines() == ["validating: 38%, 0:00:20 left", "validating: 75%, 0:00:08 left"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with counted("validating") as progress:
            progress(1, 4)
            progress(2, 4)
    shown = b""
    with suppress(OSError):  # which says that there is no more
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert b"validating" in shown and b"50%" in shown
