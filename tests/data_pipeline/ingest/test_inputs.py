"""Every kind of input, packed in every way, from a disk or a store: the same documents."""

import bz2
import gzip
import io
import json
import lzma
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig, SourceConfig, SplitConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest import sources
from data_pipeline.ingest.readers import ReadCounts
from data_pipeline.ingest.sources import Source, Unit
from data_pipeline.ingest.splits import UnitReader
from data_pipeline.ingest.table_readers import Columns, read_arrow
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from tests.data_pipeline.conftest import config, prose, put, stream

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
DOCUMENTS = [
    *(prose(50 * (i % 4), i) for i in range(40)),
    "\0 NUL \0\0",
    "אבג \u202eright to left\u202c",
    "😀 astral 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "e\u0301 \ufeff \u2028",
]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(documents)).encode()


def parquet(documents: list[str], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(documents)), "text": documents}), sink, **options)
    return sink.getvalue()


def arrow(documents: list[str], kind: pa.DataType | None = None, stream: bool = False) -> bytes:
    column = pa.array(documents, kind or pa.string())
    table = pa.table({"n": range(len(documents)), "text": column})
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def read(*paths: Path | str, errors: str = "strict", **source: Any) -> list[str]:
    """The documents, one by one."""
    found = Source("s", "data.sources.s.paths", SourceConfig(paths=[str(path) for path in paths], **source))
    settings = DataConfig.model_validate(
        {"sources": {"s": found.config}, "errors": errors, "split": SplitConfig(fraction=1e-9)}
    )
    documents: list[str] = []
    for number, part in enumerate(found.slices()):
        for piece in UnitReader(settings, Unit(number, "s", tuple(part)), lambda size: None).pieces():
            if piece.starts:
                documents.append("")
            documents[-1] += piece.text
    return documents


WANTED = [text for text in DOCUMENTS if text]
FORMATS: dict[str, bytes] = {
    "jsonl": jsonl(DOCUMENTS),
    "file.arrow": arrow(DOCUMENTS),
    "stream.arrow": arrow(DOCUMENTS, stream=True),
    "large.arrow": arrow(DOCUMENTS, pa.large_string()),
    "dictionary.arrow": arrow(DOCUMENTS, pa.dictionary(pa.int32(), pa.string())),
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_packings_hold_the_same_documents(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / f"a.{name}{suffix}"
    file.write_bytes(PACKERS[suffix](FORMATS[name]))
    assert read(file) == WANTED


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_parquet_is_read_group_by_group(tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet(DOCUMENTS, compression=compression, row_group_size=5))
    assert read(file) == WANTED
    monkeypatch.setattr(sources, "UNIT_BYTES", 1500)
    found = Source("s", "k", SourceConfig(paths=[str(file)]))
    parts = [part for unit in found.slices() for part in unit]
    assert len(parts) > 3
    assert parts[0].begin == 0
    assert [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]
    assert read(file) == WANTED
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet\.gz: Parquet is packed inside"):
        read(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("limit", [7, 50, 1000, 4001])
def test_parts_of_a_jsonl_file_are_all_of_it(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"{n}" + "漢" * (n % 90)}, ensure_ascii=n % 2 == 0) for n in range(120)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\r\n".join(lines))
    wanted = [json.loads(line)["text"] for line in lines]
    monkeypatch.setattr(sources, "UNIT_BYTES", limit)
    assert read(tmp_path / "a.jsonl") == wanted
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\nno json\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 240 is not a JSON object"):
        read(tmp_path / "a.jsonl")


def test_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo\r"]


def twice(kind: str) -> bytes:
    """A table with two columns of one name."""
    table, sink = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def wild_offsets() -> bytes:
    """An Arrow file whose second text ends a gigabyte behind the file."""
    data = arrow(["one", "two"])
    offsets = struct.pack("<3i", 0, 3, 6)
    assert data.count(offsets) == 1
    return data.replace(offsets, struct.pack("<3i", 0, 3, 2**30))


TABLES: list[tuple[str, bytes, dict[str, Any], str]] = [
    (
        "a.parquet",
        parquet(DOCUMENTS),
        {"text_key": "body"},
        r"a\.parquet has no column 'body'; its columns: 'n', 'text'",
    ),
    (
        "a.parquet",
        parquet(DOCUMENTS),
        {"text_key": "n"},
        r"column 'n' is int64, not string; columns of strings: 'text'",
    ),
    ("a.arrow", arrow(DOCUMENTS), {"text_key": "n"}, r"column 'n' is int64, not string"),
    ("a.parquet", parquet(DOCUMENTS)[:-9], {}, r"a\.parquet: cannot be read as Parquet"),
    ("a.arrow", arrow(DOCUMENTS)[:-9], {}, r"a\.arrow: cannot be read as Arrow IPC"),
    ("a.parquet", twice("parquet"), {}, r"a\.parquet has 2 columns 'text'"),
    ("a.arrow", twice("arrow"), {}, r"a\.arrow has 2 columns 'text'"),
    ("a.arrow", wild_offsets(), {}, r"a\.arrow: cannot be read as Arrow IPC"),
    ("a.arrow", b"", {}, r"a\.arrow: cannot be read as Arrow IPC"),
    ("a.arrow", b"no arrow at all", {}, r"a\.arrow: cannot be read as Arrow IPC"),
    ("a.arrow.gz", gzip.compress(arrow(DOCUMENTS))[:-9], {}, r"a\.arrow\.gz: damaged or truncated \.gz data"),
]


@pytest.mark.parametrize(("name", "content", "source", "message"), TABLES)
def test_unusable_tables_are_explained(
    tmp_path: Path, name: str, content: bytes, source: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **source)


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("fault", ["cut", "other", "behind"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str, fault: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    whole = PACKERS[suffix](prose(3000).encode())
    file.write_bytes({"cut": whole[:-20], "other": b"plain text, not packed", "behind": whole + b"junk"}[fault])
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: damaged or truncated \{suffix} data"):
        read(file)


def test_text_in_a_table_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    values = pa.array([b"fine", b"caf\xe9", None, b"", b"last"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(values), values.buffers(), null_count=1)
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": column}))
    with pytest.raises(DataError, match=r"a\.arrow, row 2: byte 3 \(0xe9\) is not UTF-8.*data\.errors=replace"):
        read(tmp_path / "a.arrow")
    assert read(tmp_path / "a.arrow", errors="replace") == ["fine", "caf\ufffd", "last"]


def test_null_is_dropped_and_counted_in_every_format(tmp_path: Path) -> None:
    """Also where it is one half of a pair, and where a whole column of a table is null."""
    rows = [{"text": "a", "more": "b"}, {"text": None, "more": "b"}, {"text": "a", "more": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for kind in ("jsonl", "parquet", "arrow"):
        assert read(tmp_path / f"a.{kind}") == ["a", "a"]
        assert read(tmp_path / f"a.{kind}", target_key="more") == ["ab"]
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "none.parquet")
    assert read(tmp_path / "none.parquet") == []


def test_what_python_cannot_hold_is_no_traceback(tmp_path: Path) -> None:
    """A filter is given every column, but for the text as Python knows it."""
    table = pa.table({"text": ["a"], "when": pa.array([2**62], pa.timestamp("s"))})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == ["a"]
    columns = Columns(str(tmp_path / "a.arrow"), ("text",), None, "strict")
    with pytest.raises(DataError, match=r"a\.arrow: column 'when' \(timestamp\[s\]\)"):
        list(read_arrow(columns, ReadCounts()))


# --- a store ---------------------------------------------------------------------------------------------------------


def test_a_store_is_read_like_a_disk(tmp_path: Path, store: Callable[[str], str]) -> None:
    put(store("web/a%20b.jsonl"), jsonl(DOCUMENTS[:9]))
    put(store("web/b/c.jsonl.zst"), zstandard.compress(jsonl(DOCUMENTS[9:20])))
    put(store("web/d.parquet"), parquet(DOCUMENTS[20:30], row_group_size=3))
    put(store("web/e.arrow"), arrow(DOCUMENTS[30:]))
    put(store("web/.hidden"), b"hidden")
    put(store("web/.git/f.jsonl"), b"hidden")
    assert read(store("web")) == WANTED
    left_out = Source("s", "k", SourceConfig(paths=[store("web")])).left_out
    assert [re.sub(r".*/web/|\?.*(?= )", "", place) for place in left_out] == [
        ".git/f.jsonl (hidden)",
        ".hidden (hidden)",
    ]
    assert read(store("web/**/*.jsonl*")) == [text for text in DOCUMENTS[:20] if text]
    assert read(store("web/**")) == WANTED
    assert read(store("web/[!bde]*")) == [text for text in DOCUMENTS[:9] if text]
    assert read(store("web/*.jsonl*")) == [text for text in DOCUMENTS[:9] if text]
    assert read(store("web/e.arrow")) == [text for text in DOCUMENTS[30:] if text]
    for path, message in (
        ("gone.txt", "does not exist"),
        ("web/*.md", "no file matches"),
        ("web/x/", "does not exist"),
    ):
        with pytest.raises(DataError, match=f"data.sources.s.paths: .*{message}"):
            read(store(path))


def test_a_dataset_comes_from_a_store_as_from_a_disk(
    tmp_path: Path, store: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 3000)
    (tmp_path / "x").mkdir()
    for name, part in (("a.jsonl", DOCUMENTS[:20]), ("b.jsonl", DOCUMENTS[20:])):
        (tmp_path / "x" / name).write_bytes(jsonl(part))
        put(store(f"x/{name}"), jsonl(part))
    split = {"rule": "hash", "fraction": 0.3}
    here = build(config(tmp_path / "d", tmp_path / "x", split=split, tokenizer={"type": "char"}))
    there = {"text": {"paths": [store("x")]}}
    build(config(tmp_path / "e", sources=there, split=split, tokenizer={"type": "char"}), processes=2)
    found = Dataset.open(tmp_path / "e")
    assert found.manifest.fingerprint == here.fingerprint
    assert stream(Windows.of(found, "train", 10)).size > 100


def test_a_store_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(DataError, match="nosuch://bucket"):
        read("nosuch://bucket/a.txt")
