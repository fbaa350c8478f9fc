"""JSON objects that carry a hash of themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.files.sealed import seal, unseal, write_sealed

CONTENT: dict[str, Any] = {"format": 2, "größe": 1.5e-7, "names": ["a", "b\n}"], "none": None, "inner": {"sha256": "0"}}


@pytest.mark.parametrize("indent", [None, 1])
def test_no_flipped_bit_goes_unnoticed(indent: int | None) -> None:
    whole = seal(json.dumps(CONTENT, indent=indent, ensure_ascii=False)).encode()
    assert unseal(whole) == CONTENT
    assert (b"\n" in whole) == (indent is not None), "a line stays a line"
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unseal(bytes(altered))


@pytest.mark.parametrize("end", [0, 1, 5, 40, -3, -90])
def test_what_was_cut_off_is_noticed(end: int) -> None:
    whole = seal(json.dumps(CONTENT, indent=1)).encode()
    with pytest.raises(ValueError):
        unseal(whole[:end])


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "[" * 100_000, '{"a":' * 100_000, '{"format": 2}'])
def test_what_is_no_object_with_a_hash_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="hash is missing|expected a JSON object|not JSON"):
        unseal(text.encode())


def test_only_the_formats_that_have_a_hash_need_one() -> None:
    assert unseal(b'{"format": 1}', formats=(2,)) == {"format": 1}
    with pytest.raises(ValueError, match="its own hash is missing"):
        unseal(b'{"format": 2}', formats=(2,))
    altered = seal('{"format": 1}').replace("1", "3", 1)
    with pytest.raises(ValueError, match="does not match its own hash"):
        unseal(altered.encode(), formats=(2,))


def test_a_file_that_cannot_hold_a_name_is_named(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", CONTENT)
    assert unseal((tmp_path / "a.json").read_bytes()) == CONTENT
    with pytest.raises(DataError, match=r"a\.json.*not UTF-8"):
        write_sealed(tmp_path / "a.json", {"folder": "\udcff"})
    assert unseal((tmp_path / "a.json").read_bytes()) == CONTENT, "what was there stays"
