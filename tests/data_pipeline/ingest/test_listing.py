"""Every file that a path leads to is read as what it is, or named: no silence, no traceback, no waiting."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.files.formats import kind, packing
from data_pipeline.ingest.sources import Source
from data_pipeline.ingest.splits import GIVEN, Corpus
from tests.data_pipeline.ingest.test_inputs import arrow, parquet, read
from tests.data_pipeline.inspection.test_commands import duet_data

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def source(*paths: Path | str) -> Source:
    return Source("s", "data.sources.s.paths", SourceConfig(paths=[str(path) for path in paths]))


def names(found: Source, folder: Path) -> list[str]:
    return [str(Path(file).relative_to(folder)) for file in found.files]


# --- what a file holds -----------------------------------------------------------------------------------------------

READ = {
    **{f"a.{ending}": LINES for ending in ("json", "ndjson", "JSONL", "jsonlines", "Json")},
    "a.json.gz": gzip.compress(LINES),
    "a.JSONL.GZ": gzip.compress(LINES),
    "a.ndjson.zstd": zstandard.compress(LINES),
    "a.jsonl.XZ": lzma.compress(LINES),
    "a.jsonl.Bz2": bz2.compress(LINES),
    **{f"a.{ending}": parquet(["one", "two"]) for ending in ("parq", "PARQUET", "pq")},
    **{f"a.{ending}": arrow(["one", "two"]) for ending in ("feather", "ipc", "ARROW", "arrows")},
}


@pytest.mark.parametrize("name", READ)
def test_endings_say_what_is_in_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(READ[name])
    assert read(tmp_path / name) == ["one", "two"]


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.txt"))
    return sink.getvalue()


WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
REFUSED = {
    **{f"a.{ending}": b"x" for ending in ("csv", "TSV", "tar", "tgz", "zip", "pdf", "DOCX", "lz4", "tar.gz", "csv.xz")},
    "array.json": json.dumps([{"text": "one"}]).encode(),
    "pretty.json": json.dumps({"text": "one"}, indent=1).encode(),
    "pretty.json.gz": gzip.compress(json.dumps([{"text": "one"}], indent=1).encode()),
    "lines.txt": LINES,
    "part-00000": LINES,
    "other-key.txt": b'{"body": "one"}\n{"body": "two"}\n',
    "lines.txt.gz": gzip.compress(LINES),
    "packed.txt": gzip.compress(LINES),
    "packed.jsonl": gzip.compress(LINES),
    "twice.jsonl.gz.gz": gzip.compress(gzip.compress(LINES)),
    "zst.txt": zstandard.compress(LINES),
    "xz.txt": lzma.compress(LINES),
    "bz2.txt": bz2.compress(LINES),
    "plain.jsonl.gz": LINES,
    "plain.txt.ZST": LINES,
    "table.txt": parquet(["one"]),
    "arrow.txt": arrow(["one"]),
    "tar.txt": tar(),
    "tar.jsonl": tar(),
    "pdf.txt": b"%PDF-1.4\n",
    "zip.txt": b"PK\x03\x04",
    "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "program": b"\x7fELF\x02\x01\x01\0\xf0\0",
    **{f"{encoding}.txt": "\ufeffone two".encode(encoding) for encoding in WIDE},
    **{f"{encoding}.jsonl": ("\ufeff" + LINES.decode()).encode(encoding) for encoding in WIDE},
    "no-mark.txt": ("one two three " * 9).encode("utf-16-le"),
    **{f"empty.txt{suffix}": b"" for suffix in (".gz", ".zst", ".bz2", ".xz", ".GZ")},
}


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, errors: str) -> None:
    (tmp_path / name).write_bytes(REFUSED[name])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read(tmp_path / name, errors=errors)


def test_text_that_only_looks_like_something_else_is_text(tmp_path: Path) -> None:
    texts = ['{"version": 3}', '{"a": 1}\nand more', "{\n", "BZhang", "PAR10", "[1]\n", "\0", "{}\n{}\n"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read(tmp_path) == texts
    assert (kind("a.gz/b"), packing("a.gz/b"), kind("s3://b/x.JSON.gz?region=a.csv")) == ("plain", "", "jsonl")


# --- which files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", ".git/x.txt", ".hidden.txt", "../other/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_linked_folders_are_read_once(tree: Path) -> None:
    (tree / "linked").symlink_to("../other")
    (tree / "sub" / "loop").symlink_to("..")
    (tree / "loop").symlink_to(".")
    (tree / "again").symlink_to("sub")
    (tree / "z.txt").symlink_to("a.txt")
    assert names(source(tree), tree) == ["a.txt", "again/b.txt", "again/deep/c.txt", "linked/d.txt"]
    assert names(source(tree / "**"), tree) == names(source(tree), tree)
    assert names(source(tree / "**/*.txt"), tree) == names(source(tree), tree)
    assert names(source(tree / "*/*.txt"), tree) == ["again/b.txt", "linked/d.txt", "loop/a.txt"]
    assert names(source(f"file://{tree}/sub", tree / "sub"), tree) == ["sub/b.txt", "sub/deep/c.txt", "sub/loop/a.txt",
                                                                       "sub/loop/linked/d.txt"]  # fmt: skip


def test_names_are_as_they_were_given(tree: Path) -> None:
    with contextlib.chdir(tree):
        for path in (".", "./**", "**", "**/*.txt"):
            assert source(path).files == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
        assert source("sub/", "*.txt", "../other").files == ["../other/d.txt", "a.txt", "sub/b.txt", "sub/deep/c.txt"]


def test_what_is_left_out_is_named(tree: Path) -> None:
    assert source(tree).left_out == [f"{tree}/.git (hidden)", f"{tree}/.hidden.txt (hidden)"]
    assert source(tree / "**/*.txt").left_out == source(tree).left_out
    found = source(tree / "*")
    assert names(found, tree) == ["a.txt"]
    assert [place.split(" ")[0] for place in found.left_out] == [f"{tree}/.git", f"{tree}/.hidden.txt", f"{tree}/sub"]
    assert names(source(tree / ".hidden.txt", tree / ".g*/*"), tree) == [".git/x.txt", ".hidden.txt"]
    shutil.rmtree(tree / "sub")
    (tree / "a.txt").unlink()
    for path in (tree, tree / "*", tree / "**"):
        with pytest.raises(DataError, match=r"data\.sources\.s\.paths: .*left out: .*\.git"):
            source(path)


def test_what_is_no_file_is_named(tree: Path) -> None:
    def refused(name: str, what: str) -> None:
        for path in (tree, tree / name, tree / f"{name}*", tree / "**"):
            with pytest.raises(DataError, match=rf"data\.sources\.s\.paths: .*{name} is {what}"):
                source(path)
        (tree / name).unlink()

    (tree / "gone").symlink_to("nowhere")
    for pattern in ("*/*.txt", "**/*.txt"):
        assert f"{tree}/gone (a link that leads nowhere)" in source(tree / pattern).left_out
    refused("gone", "a link to nowhere")
    (tree / "self").symlink_to("self")
    refused("self", "a link to self")
    os.mkfifo(tree / "pipe")
    refused("pipe", "a pipe")
    (tree / "device").symlink_to("/dev/null")
    refused("device", "a device")
    with contextlib.chdir(tree), socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        refused("sock", "a socket")
    assert names(source(f"{tree}/*/"), tree) == ["sub/b.txt", "sub/deep/c.txt"]
    with pytest.raises(DataError, match=r"no file matches .*; left out: .*sub \(a folder"):
        source(tree / "su*")


@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """A folder of a user who has no special rights: who runs this, or `nobody` in place of root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
            try:
                yield folder
            finally:
                os.seteuid(0)
        else:
            yield folder


def test_what_may_not_be_read_is_an_error() -> None:
    with nobody() as folder:
        (folder / "a.txt").write_text("text")
        for name in ("closed", "blind"):
            (folder / name).mkdir()
            (folder / name / "b.txt").write_text("text")
        (folder / "closed").chmod(0)
        with pytest.raises(DataError, match=r"closed/b\.txt cannot be read: Permission denied"):
            source(folder / "*/b.txt")
        for path in (folder, folder / "**", folder / "*/*.txt"):
            with pytest.raises(DataError, match="closed cannot be listed: Permission denied"):
                source(path)
        with pytest.raises(DataError, match=r"closed/b\.txt cannot be read: Permission denied"):
            source(folder / "closed" / "b.txt")
        (folder / "closed").chmod(0o700)
        (folder / "blind").chmod(0o400)
        with pytest.raises(DataError, match=r"blind/b\.txt: cannot be read: Permission denied"):
            source(folder)
        (folder / "blind").chmod(0o700)
        (folder / "a.txt").chmod(0)
        with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
            read(folder)


def test_a_name_that_is_not_utf8_is_refused(tree: Path) -> None:
    (tree / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(DataError, match=r"caf\\xe9\.txt.* not UTF-8; rename it") as raised:
        source(tree)
    str(raised.value).encode()
    for name in (os.fsdecode(b"caf\xe9"), GIVEN):
        with pytest.raises(DataError, match="cannot be a source's name"):
            Corpus(DataConfig(sources={name: SourceConfig(paths=[str(tree / "a.txt")])}))


def test_a_build_names_what_gave_nothing(tree: Path) -> None:
    (tree / "empty.txt").touch()
    (tree / "null.jsonl").write_text('{"text": null}\n')
    (tree / "blank.jsonl").write_text("\n")
    arguments = [
        f"data.sources.s.paths=[{tree}]",
        f"data.path={tree.parent / 'd'}",
        *("data.tokenizer.type=char", "data.split.rule=tail", "data.split.fraction=0.5"),
    ]
    planned = duet_data("build", *arguments, "--dry-run").splitlines()
    assert f"empty        s: 1: {tree}/empty.txt" in planned
    hidden = f"left out     s: 2: {tree}/.git (hidden), {tree}/.hidden.txt (hidden)"
    assert hidden in planned
    nothing = f"no document  s: 3: {tree}/blank.jsonl, {tree}/empty.txt, {tree}/null.jsonl"
    built = duet_data("build", *arguments).splitlines()
    assert {hidden, nothing, "dropped      s: 2 documents (empty)"} <= set(built)
    arguments[1] = f"data.path={tree.parent / 'e'}"
    assert hidden in duet_data("build", *arguments, "--prepare").splitlines()
    duet_data("build", *arguments, "--task", "0", "--tasks", "1")
    assert nothing in duet_data("build", *arguments, "--merge").splitlines()
