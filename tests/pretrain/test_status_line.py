"""The line that says what goes on while nothing else is said."""

import os
import time
from collections.abc import Iterator

import pytest

from pretrain import status_line
from pretrain.status_line import StatusLine


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
