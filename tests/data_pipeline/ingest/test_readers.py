import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, SourceConfig, SplitConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest import readers
from data_pipeline.ingest.readers import ReadCounts, read_jsonl, read_plain
from data_pipeline.ingest.sources import Source, Unit, cut
from data_pipeline.ingest.splits import UnitReader


def texts_of(source: Source, errors: readers.Errors = "strict") -> tuple[list[str], ReadCounts]:
    counts = ReadCounts()
    documents: list[str] = []
    open_document = False
    units = [Unit(0, "s", tuple(part)) for part in source.slices()]
    for unit in units:
        settings = DataConfig(sources={"s": source.config}, errors=errors, split=SplitConfig(fraction=1e-9))
        reader = UnitReader(settings, unit, lambda size: None)
        for piece in reader.pieces():
            if open_document:
                documents[-1] += piece.text
            else:
                documents.append(piece.text)
            open_document = not piece.ends
        counts.documents += reader.counts.documents
        counts.bytes += reader.counts.bytes
        counts.dropped += reader.counts.dropped
        counts.replaced += reader.counts.replaced
        counts.input_bytes += reader.counts.input_bytes
    return documents, counts


def source_of(*paths: Path | str, text_key: str = "text") -> Source:
    return Source("s", "data.sources.s.paths", SourceConfig(paths=[str(path) for path in paths], text_key=text_key))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_text_arrives_as_it_is(tmp_path: Path, suffix: str) -> None:
    text = "a\ufeff\r\nb\rc\n\n \t\0漢😀\u2028" * 40_000 + "no newline at the end"
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](text.encode()))
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in (text, "", "b"))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(PACKERS[suffix](lines.encode()))
    documents, counts = texts_of(source_of(tmp_path))
    assert documents == [text, text, "b"]
    assert counts.dropped == {"empty": 1}
    assert counts.documents == 3
    assert counts.bytes == 2 * len(text.encode()) + 1
    assert counts.input_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_files_of_several_members_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"".join(PACKERS[suffix](part) for part in (b"one ", b"", b"two ", b"three" * 100_000)) + bytes(8))
    assert texts_of(source_of(file))[0] == ["one two " + "three" * 100_000]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_truncated_archives_are_errors(tmp_path: Path, suffix: str, kept: float) -> None:
    import random

    data = PACKERS[suffix](random.Random(0).randbytes(60_000).hex().encode())
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: damaged or truncated"):
        texts_of(source_of(file))


def test_damaged_archives_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"damaged or truncated .zst"):
        texts_of(source_of(file))


@pytest.mark.parametrize("at", [0, 5, readers.CHUNK_BYTES - 2, readers.CHUNK_BYTES - 1, 2 * readers.CHUNK_BYTES + 7])
def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path, at: int) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * at + "é".encode("latin-1") + b" fin")
    with pytest.raises(DataError, match=rf"latin\.txt: byte {at} \(0xe9\).*data\.errors=replace"):
        list(read_plain(str(file), "strict", ReadCounts()))
    counts = ReadCounts()
    assert "".join(read_plain(str(file), "replace", counts)) == "x" * at + "\ufffd fin"
    assert counts.replaced == 1


def test_a_character_cut_off_at_the_end_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("ab漢".encode()[:-1])
    with pytest.raises(DataError, match="byte 2"):
        list(read_plain(str(file), "strict", ReadCounts()))


@given(st.binary(max_size=60), st.integers(0, 20))
def test_replacing_counts_every_undecodable_byte(data: bytes, junk: int) -> None:
    counts = ReadCounts()
    text, used = readers.decode(data + b"\xff" * junk, True, "replace", "here", 0, counts)
    assert used == len(data) + junk
    assert counts.replaced == text.count("\ufffd") - data.count("\ufffd".encode())
    assert counts.replaced >= junk


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", r"line 2 is not a JSON object.*'not json"),
        (b"[1]", "line 2 is not a JSON object but a list"),
        (b'{"title": "t", "body": "b"}', "line 2 has no key 'text'; its keys: 'title', 'body'"),
        (b'{"text": 5, "body": "b"}', "line 2: 'text' is a int, not a string; keys with strings: 'body'.*null"),
        (b'{"text": ["a"]}', "line 2: 'text' is a list, not a string.*null"),
        (b"{", r"line 2 is not a JSON object.*jq -c \."),
        (b'{"text": "\xe9"}', r"line 2: byte 25 \(0xe9\)"),
        (b'{"text": "\\ud83d"}', r"line 2: 'text' holds half a surrogate pair \(\\ud83d\)"),
        (b'{"text": "' + b"x" * 200 + b'"}', "line 2 .at byte 15. is longer than 100 bytes"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as raised:
        list(read_jsonl(str(file), "text", "strict", ReadCounts()))
    assert str(file) in str(raised.value)


def test_half_surrogates_can_be_replaced_and_blank_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n  \n{"text": "a\\ud83d\\ude00 \\ud83d"}')
    counts = ReadCounts()
    found = read_jsonl(str(file), "text", "replace", counts)
    assert ["".join(document.chunks(counts)) for document in found] == ["a😀 \ufffd"]
    assert counts.replaced == 1


def test_text_that_is_null_is_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n')
    documents, counts = texts_of(source_of(file))
    assert documents == ["a"]
    assert counts.dropped == {"empty": 2}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_mark_at_the_head_of_a_file_is_no_text(tmp_path: Path, suffix: str) -> None:
    mark, line = "\ufeff", json.dumps({"text": "one"}) + "\n"
    for name, text in {
        "a.txt": f"{mark}one \ufeff two",
        "b.txt": mark,
        "c.jsonl": mark + line + mark + line,
        "d.json": mark + line,
        "e.jsonl": json.dumps({"text": "\ufeffone"}),
    }.items():
        (tmp_path / f"{name}{suffix}").write_bytes(PACKERS[suffix](text.encode()))
    documents, counts = texts_of(source_of(tmp_path))
    assert documents == ["one \ufeff two", "one", "one", "one", "\ufeffone"]
    assert counts.dropped == {"empty": 1}
    (tmp_path / "z.txt").write_bytes(mark.encode() + b"ab\xff")
    with pytest.raises(DataError, match=r"z\.txt: byte 5 \(0xff\)"):
        texts_of(source_of(tmp_path / "z.txt"))


def test_paths_are_sorted_once_each_and_missing_ones_are_errors(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = source_of(tmp_path / "b.txt", tmp_path, tmp_path / "*.txt")
    assert [Path(file).name for file in source.files] == ["a.txt", "b.txt", "c.txt"]
    (tmp_path / "none").mkdir()
    for path, message in (("gone.txt", "does not exist"), ("*.md", "no file matches"), ("none", "directory without")):
        with pytest.raises(DataError, match=f"data.sources.s.paths: .*{message}"):
            source_of(tmp_path / path)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = source_of(file)
    file.write_text("one more")
    with pytest.raises(DataError, match="changed while it was read"):
        texts_of(source)


@given(st.lists(st.text("ab\n漢😀", max_size=30), max_size=8), st.integers(0, 2**32))
def test_cutting_loses_nothing_and_ignores_chunks(chunks: list[str], seed: int) -> None:
    pieces = list(cut(chunks, after=10, limit=20))
    text = "".join(chunks)
    assert "".join(piece.text for piece in pieces) == text
    assert pieces == list(cut([text], after=10, limit=20)) == list(cut(text, after=10, limit=20))
    assert [piece.continues for piece in pieces] == [True] * (len(pieces) - 1) + [False] * bool(pieces)
    for piece in pieces[:-1]:
        size = len(piece.text.encode())
        assert (
            10 < size <= 20
            and piece.text.endswith("\n")
            and "\n" not in piece.text.encode()[10:-1].decode(errors="ignore")
        ) or 16 < size <= 20
