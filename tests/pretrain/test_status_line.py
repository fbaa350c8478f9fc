"""The line that says what goes on while nothing else is said."""

import fcntl
import os
import struct
import termios
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import status_line
from pretrain.status_line import StatusLine, fit


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)


def test_it_counts_in_silence_and_is_gone_before_the_next_word(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_line, "TICK_SECONDS", 0.02)
    ours, theirs = terminal
    with open(theirs, "w", buffering=1) as stream:
        line = StatusLine(theirs, "importing")
        line.watch(stream)
        seen = ""

        def wait_for(text: str) -> None:
            nonlocal seen
            while text not in seen:
                seen += os.read(ours, 1024).decode()

        wait_for("importing … 0 s")
        with line.doing("validating"):
            wait_for("validating … 0 s")
        seen = ""
        print("a word", file=stream)
        wait_for("\r\x1b[Ka word\r\n")
        wait_for("importing … 0 s")
        print("\x1b[2Khalf a", end="", file=stream, flush=True)
        time.sleep(0.1)
        print(" line", file=stream)
        wait_for("\r\x1b[K\x1b[2Khalf a line\r\n")
        seen = ""
        wait_for("importing")
        line.end()
        print("the end", file=stream)
        wait_for("\r\x1b[Kthe end\r\n")


def test_it_is_for_terminals_only(capfd: pytest.CaptureFixture[str]) -> None:
    status_line.begin("waiting")
    with status_line.doing("nothing"):
        assert status_line._line is None


@given(
    st.lists(st.sampled_from(["a", "word", "label ", "`duet train x`", "/a/long/path/to/somewhere"])),
    st.integers(8, 40),
)
def test_lines_are_broken_at_spaces_only(words: list[str], width: int) -> None:
    text = " ".join(words)
    lines = fit(text, width).split("\n")
    assert " ".join(lines).split() == text.split()
    parts = [line.split("`duet train x`") for line in lines]
    assert all(len(line) <= width or len("".join(part).split()) <= 2 for line, part in zip(lines, parts, strict=True))
    assert sum(len(part) - 1 for part in parts) == text.count("`duet train x`"), "a command stays in one line"


def test_the_rest_of_a_row_stands_below_it_and_a_command_stays_one() -> None:
    assert fit('{"one": "long line"}', 10) == '{"one": "long line"}', (
        "a program reads it where the terminal is recorded"
    )
    assert fit("open it     mlflow ui --uri x", 24, " \\") == "open it     mlflow ui \\\n            --uri x"


def test_words_are_kept_whole_on_a_terminal(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with open(theirs, "w", buffering=1) as stream:
        line = StatusLine(theirs, "waiting")
        line.watch(stream)
        print("several words that are too many", file=stream)
        shown = b""
        while shown.count(b"\n") < 2:  # a terminal hands over what has arrived, which may be less than a line
            shown += os.read(ours, 1024)
        assert shown == b"several words that\r\nare too many\r\n"
        line.end()
