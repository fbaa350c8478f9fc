"""Growing text: nothing is shown that is taken back, nothing is lost, stop strings end it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from pretrain.inference.text import GrowingText, read_prompts


def decode(tokens: Sequence[int]) -> str:
    """Of tokens that are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def grown(text: str, stops: Sequence[str] = ()) -> tuple[list[str], GrowingText]:
    """Pieces, until the text has ended."""
    growing = GrowingText(decode, stops)
    pieces = []
    for token in text.encode():
        pieces.append(growing.add(token))
        if growing.ended:
            break
    return [*pieces, growing.finish()], growing


@given(
    st.text(alphabet="abé€😀\n", max_size=20), st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3)
)
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, growing = grown(text, stops)
    # The stop string that is whole first ends the text; of several, the one that began first.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    whole = text[: ends[0]] if ends else text
    assert "".join(pieces) == whole[: min((at for stop in stops if (at := whole.find(stop)) >= 0), default=None)]
    assert growing.ended == bool(ends)


def test_text_waits_only_while_it_may_begin_a_stop_string() -> None:
    pieces, growing = grown("a\nb\n\nc", ["\n\n"])
    assert pieces == ["a", "", "\nb", "", "", ""]
    assert growing.ended
    assert grown("ab\n", ["\n\n"])[0] == ["a", "b", "", "\n"]


def test_a_character_is_shown_when_it_is_whole() -> None:
    assert grown("€a")[0] == ["", "", "€", "a", ""]
    growing = GrowingText(decode)
    assert [growing.add(byte) for byte in (0xE2, 0x82, ord("a"))] == ["", "", "\ufffda"], "bytes that are no character"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty stop string"):
        GrowingText(decode, ["a", ""])


def test_prompts_come_one_on_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone \n\n two\r\nthree\u2028four\ffive".encode())
    assert read_prompts(file) == ["one ", " two", "three\u2028four\ffive"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\n\n", "no prompt in it"), (b"ab\xff", "not UTF-8 at byte 2")]
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(file)
