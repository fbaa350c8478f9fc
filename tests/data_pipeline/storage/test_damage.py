"""Damaged descriptions: a manifest that was altered is an error that names it, and never another dataset."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.files.sealed import seal
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.sampling.pair_windows import PairWindows
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from tests.data_pipeline.conftest import prose, stream

FORMATS = Path(__file__).parents[1]
"""Datasets of former formats: `format1` of one stream, `format2` of text (2) and of pairs (3), by the last version
that wrote them."""


def edited(path: Path, change: Callable[[dict[str, Any]], object], sealed: bool) -> None:
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    change(content)
    text = json.dumps(content, indent=1)
    path.write_text(seal(text) if sealed else text)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "dtype": lambda m: m.update(dtype="int32"),
    "small shards": lambda m: m.update(shard_tokens=10),
    "no batches": lambda m: m.update(batch_tokens=0),
    "many tokens": lambda m: m["sources"][0]["tokens"].update(train=10**15),
    "tokens of a split": lambda m: m["splits"]["train"].update(tokens=3),
    "bytes of a split": lambda m: m["splits"]["validation"].update(bytes=3),
    "counts of bytes": lambda m: m["splits"]["validation"].update(byte_counts=[1] * 256),
    "a vast vocabulary": lambda m: m["tokenizer"].update(vocab_size=2**31),
    "a large vocabulary": lambda m: m["tokenizer"].update(vocab_size=2**31 - 1),
    "a negative vocabulary": lambda m: m["tokenizer"].update(vocab_size=-1),
    "a shard elsewhere": lambda m: m["shards"][0].update(path="train/../../../etc/passwd"),
    "a shard twice": lambda m: m["shards"].insert(0, m["shards"][0]),
    "a shard of nobody": lambda m: m["shards"][0].update(source="nobody"),
    "a long shard": lambda m: m["shards"][0].update(tokens=10**12),
    "batches": lambda m: m["shards"][0].update(batches=7),
    "documents": lambda m: m["shards"][0].update(documents=-1),
    "a list": lambda m: m.update(shards={"0": m["shards"][0]}),
    "a number": lambda m: m.update(shard_tokens="many"),
    "nothing": lambda m: m.clear(),
    "a source less": lambda m: m["sources"].clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_is_damage_even_with_a_hash_that_fits(dataset: Dataset, change: Any) -> None:
    edited(dataset.path / "manifest.json", change, sealed=True)
    with pytest.raises(DataError, match=r"manifest\.json (is damaged: |has format None)"):
        Manifest.load(dataset.path)


@pytest.mark.parametrize("name", ["format1/one", "format2/text", "format2/pairs"])
def test_former_formats_are_held_against_themselves(tmp_path: Path, name: str) -> None:
    shutil.copytree(FORMATS / name, tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    whole = path.read_text()
    changes = {
        **CHANGES,
        "a hash": lambda m: m["shards"][0].update(xxh3_128="0" * 32),
        "a smaller vocabulary": lambda m: m["tokenizer"].update(vocab_size=30),
        "another tokenizer": lambda m: m["tokenizer"].update(sha256="0" * 64),
        "a fingerprint": lambda m: m.update(fingerprint="0" * 64),
        "a format": lambda m: m.update(format=5 - m["format"]),
    }
    if name == "format1/one":  # which knows no sources of shards
        del changes["many tokens"], changes["a shard of nobody"]
    for change in changes.values():
        edited(path, change, sealed=False)
        with pytest.raises(DataError, match=r"manifest\.json (is damaged: |has format)|wrong tokenizer"):
            Dataset.open(tmp_path / "d").verify()
        path.write_text(whole)
    Dataset.open(tmp_path / "d").verify()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b'{"format": 4}',
        b'{"format": 2}',
        b'{"format": [2]}',
        b'{"format": 1e999, "shards": NaN}',
        b'{"format": 4, "\\ud800": 1}',
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest_is_damage(dataset: Dataset, content: bytes) -> None:
    path = dataset.path / "manifest.json"
    for text in (content, seal(content.decode(errors="replace")).encode()):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"manifest\.json (is damaged: |has format)"):
            Manifest.load(dataset.path)


def test_a_manifest_that_cannot_be_read_is_named(dataset: Dataset) -> None:
    (dataset.path / "manifest.json").unlink()
    (dataset.path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        Manifest.load(dataset.path)


def test_datasets_of_formats_2_and_3_are_read_as_they_were() -> None:
    text, pairs = Dataset.open(FORMATS / "format2" / "text"), Dataset.open(FORMATS / "format2" / "pairs")
    for dataset, number in ((text, 2), (pairs, 3)):
        dataset.verify()
        assert dataset.manifest.format == number
        assert dataset.manifest.pairs == (number == 3)
        assert dataset.manifest.weights is None
    assert text.manifest.fingerprint.startswith("9a24041630fae3f3")
    assert text.tokenizer().decode(stream(Windows.of(text, "train", 50, partial=True, source="a"))) in prose(1500)
    assert len(PairWindows.of(pairs, "train", 64)) + len(PairWindows.of(pairs, "validation", 64)) == 60


def flips(dataset: Path, count: int, seed: int) -> dict[str, int]:
    """One bit flipped in each of `count` copies: how often it was an error, and how often what is read was the same."""
    reference = contents_of(Dataset.open(dataset))
    files = sorted(file for file in dataset.rglob("*") if file.is_file() and file.suffix in (".json", ".arrow"))
    files = [file for file in files if file.name != "meta.json"]
    rng, found = np.random.default_rng(seed), {"refused": 0, "the same": 0, "different": 0}
    for number in range(count):
        file = files[number % len(files)] if number % 2 else dataset / "manifest.json"
        whole = file.read_bytes()
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            opened = Dataset.open(dataset)
            opened.verify()
            found["the same" if contents_of(opened) == reference else "different"] += 1
        except DataError as error:
            assert str(dataset) in str(error)
            found["refused"] += 1
        finally:
            file.write_bytes(whole)
    return found


def contents_of(dataset: Dataset) -> tuple[Any, ...]:
    """All that a run takes from a dataset."""
    windows = PackedWindows.of(dataset, "train", 32)
    rows = windows.read(np.arange(len(windows)))
    streams = [stream(Windows.of(dataset, split, 50, partial=True)).tobytes() for split in ("train", "validation")]
    return (dataset.manifest.model_dump(), rows.tobytes(), *streams)


@pytest.fixture
def packed(dataset: Dataset) -> Path:
    """With plans of packed windows, of several record batches."""
    prepare(dataset, 32)
    return dataset.path


@pytest.mark.parametrize("count", [120, pytest.param(1500, marks=pytest.mark.drill)])
def test_no_flipped_bit_makes_another_dataset(packed: Path, count: int) -> None:
    found = flips(packed, count, seed=16)
    print(found)
    assert found["different"] == 0
    assert found["refused"] > count * 0.8  # the others are of padding, in plans


def test_a_damaged_plan_is_made_anew_and_a_line_says_so(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.open(packed)
    for file in sorted((packed / "packing").glob("*.arrow")):
        whole = file.read_bytes()
        heads = whole.index(b"windows"), whole.rindex(b"xxh3") + 20
        for at in (*heads, len(whole) // 3, len(whole) // 2, len(whole) - 30):
            for content in (whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :], whole[:at]):
                file.write_bytes(content)
                prepare(dataset, 32)
                assert file.read_bytes() == whole or file.read_bytes() == content
                if file.read_bytes() == content:  # padding
                    assert contents_of(dataset)
                else:
                    assert str(file) in capsys.readouterr().err
        file.write_bytes(whole)
    prepare(dataset, 32)
    assert capsys.readouterr().err == ""


def test_plans_of_the_first_format_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FORMATS / "format2" / "text", tmp_path / "d")
    before = {file.name: file.read_bytes() for file in (tmp_path / "d" / "packing").glob("*.arrow")}
    dataset = Dataset.open(tmp_path / "d")
    prepare(dataset, 64)
    windows = {name: PackedWindows.of(dataset, "train", 64, name) for name in dataset.sources()}
    old = {name: found.read(np.arange(len(found))) for name, found in windows.items()}
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "d" / "packing").glob("*.arrow")}
    shutil.rmtree(tmp_path / "d" / "packing")
    prepare(dataset, 64)
    for name, rows in old.items():
        found = PackedWindows.of(dataset, "train", 64, name)
        assert np.array_equal(found.read(np.arange(len(found))), rows)
    assert capsys.readouterr().err == ""
