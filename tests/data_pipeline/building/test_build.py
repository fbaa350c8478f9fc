import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.building.api import build, build_tokenizer
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.sealed import seal, unseal
from data_pipeline.ingest.splits import SPLITS, Corpus, UnitReader
from data_pipeline.inspection.statistics import documents
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from tests.corpora import corpora
from tests.data_pipeline.conftest import PEAK, REPOSITORY, config, contents, prose, stream

WriteJsonl = Callable[[str, list[str]], Path]


def texts(dataset: Dataset) -> dict[str, list[str]]:
    """The documents of each split, decoded; EOS is checked."""
    tokenizer = dataset.tokenizer()
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        found[split] = []
        for rows in documents(dataset, split):
            ids = np.concatenate(rows)
            assert tokenizer.eos_id not in ids[:-1]
            found[split].append(tokenizer.decode(ids))
    return found


def files_of(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name != ".lock" and not name.startswith("_work")}


def subprocess_build(settings: DataConfig, prelude: str = "") -> subprocess.Popen[str]:
    program = (
        "import sys\nfrom data_pipeline.building.api import build\nfrom data_pipeline.config import DataConfig\n"
        f"{prelude}\nprint('ready', flush=True)\n"
        "print(build(DataConfig.model_validate_json(sys.argv[1])).fingerprint)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, settings.model_dump_json()],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_long_documents_come_back_exactly(tmp_path: Path, jsonl: WriteJsonl) -> None:
    unbroken = prose(500_000, 1).replace("\n", " ").replace(" ", "")[:2_500_000]
    wanted = [prose(300_000), "short", "", unbroken, "\n" * 1_100_000, "end"]
    train = jsonl("train.jsonl", wanted)
    held = tmp_path / "held.txt"
    held.write_text("held out\r\n", newline="")
    split = {"rule": "given", "files": [str(held)]}
    tokenizer = {"vocab_size": 400, "character_coverage": 0.999, "sample_bytes": 200_000}
    built = build(config(tmp_path / "d", train, split=split, tokenizer=tokenizer, shard_tokens=1_500_000))
    dataset = Dataset.open(tmp_path / "d")
    dataset.verify()
    assert texts(dataset) == {"train": [text for text in wanted if text], "validation": ["held out\r\n"]}
    assert built.sources[0].dropped == {"empty": 1}
    assert built.sources[0].documents == built.splits["train"].documents == 5
    assert built.splits["train"].bytes == len("".join(wanted).encode())
    shards = dataset.manifest.shards_of("train")
    assert len(shards) > 1
    assert [shard.tokens for shard in shards[:-1]] == [1_500_000] * (len(shards) - 1)
    assert stream(Windows.of(dataset, "train", 1000, partial=True)).size == built.splits["train"].tokens


def test_the_tail_of_one_file_is_nanogpts(tmp_path: Path) -> None:
    file = corpora("tinyshakespeare/input.txt")
    built = build(config(tmp_path / "d", file, tokenizer={"type": "char"}))
    text = file.read_text()
    dataset = Dataset.open(tmp_path / "d")
    cut = int(len(text) * 0.9)
    assert texts(dataset) == {"train": [text[:cut]], "validation": [text[cut:]]}
    assert built.tokenizer.vocab_size == 67
    assert built.splits["train"].tokens == cut
    assert built.splits["validation"].tokens == len(text) - cut + 1
    assert built.splits["validation"].order0_entropy() == pytest.approx(4.8147, abs=1e-4)
    assert built.dtype == "uint16"


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_tail_cuts_each_source_at_a_character(tmp_path: Path, jsonl: WriteJsonl, fraction: float) -> None:
    sources = {
        "one": {"paths": [str(jsonl("one.jsonl", ["漢字" * 50, "a", "", "é" * 99]))]},
        "two": {"paths": [str(jsonl("two.jsonl", ["b" * 1000]))]},
    }
    split = {"rule": "tail", "fraction": fraction}
    settings = config(tmp_path / "d", split=split, sources=sources, tokenizer={"type": "char"})
    manifest = build(settings)
    parts = {source.name: source.split_bytes for source in manifest.sources}
    for name, size in (("one", 499), ("two", 1000)):
        assert parts[name]["train"] + parts[name]["validation"] == size
        assert parts[name]["validation"] == pytest.approx(fraction * size, abs=4)
    unit = Corpus(settings).units()[0]
    pieces = list(UnitReader(settings, unit, lambda size: None, None, parts["one"]["train"] + 1).pieces())
    assert "".join(piece.text for piece in pieces) == "漢字" * 50 + "a" + "é" * 99
    assert sum(piece.ends for piece in pieces) == 3
    assert sum(piece.starts for piece in pieces) == 3 + sum(not piece.ends for piece in pieces)
    assert sum(len(piece.text.encode()) for piece in pieces if piece.split == "train") == parts["one"]["train"]


def test_a_hash_split_keeps_documents_whole_and_duplicates_together(tmp_path: Path, jsonl: WriteJsonl) -> None:
    wanted = [prose(20, seed % 300) for seed in range(400)]
    split = {"rule": "hash", "fraction": 0.2}
    build(config(tmp_path / "d", jsonl("a.jsonl", wanted), split=split))
    found = texts(Dataset.open(tmp_path / "d"))
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    assert not set(found["train"]) & set(found["validation"])
    assert 0.12 < len(found["validation"]) / len(wanted) < 0.28
    build(config(tmp_path / "e", jsonl("b.jsonl", wanted[::-1]), split=split))
    assert set(texts(Dataset.open(tmp_path / "e"))["validation"]) == set(found["validation"])


def test_many_small_chinese_documents(tmp_path: Path) -> None:
    import gzip

    lines = gzip.decompress(corpora("tang/tang_poems.jsonl.gz").read_bytes()).decode().splitlines()[:3000]
    poems = [json.loads(line) for line in lines]
    file = tmp_path / "tang.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    settings = config(
        tmp_path / "d",
        file,
        tokenizer={"type": "bpe", "vocab_size": 4000, "character_coverage": 0.98},
        split={"rule": "hash", "fraction": 0.05},
    )
    build(settings)
    found = texts(Dataset.open(tmp_path / "d"))
    assert sorted(found["train"] + found["validation"]) == sorted(poem["text"] for poem in poems if poem["text"])


def test_a_rebuild_elsewhere_is_byte_identical(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(5000))
    built = build(config(tmp_path / "d", file, shard_tokens=5000))
    assert build(config(tmp_path / "e", file, shard_tokens=5000)) == built
    assert files_of(tmp_path / "d") == files_of(tmp_path / "e")
    assert str(tmp_path).encode() not in b"".join(
        data for name, data in files_of(tmp_path / "d").items() if name != "manifest.json"
    )
    moved = file.rename(tmp_path / "b.txt")
    assert build(config(tmp_path / "f", moved, shard_tokens=5000)).fingerprint == built.fingerprint
    assert build(config(tmp_path / "d", moved, shard_tokens=5000)) == built


def test_a_second_build_does_nothing_and_another_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(3000))
    settings = config(tmp_path / "d", file)
    built = build(settings)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*.*")}
    stages: list[str] = []
    assert build(settings, lambda stage, done, total: stages.append(stage)) == built
    assert stages[-1] == "unchanged"
    assert {path: path.stat().st_mtime_ns for path in stamps if path.name != ".lock"} == {
        path: stamp for path, stamp in stamps.items() if path.name != ".lock"
    }
    other = config(tmp_path / "d", file, seed=5)
    with pytest.raises(DataError, match=r"another dataset is at .*: seed: 0 there, 5 here\. .*--overwrite"):
        build(other)
    file.write_text(prose(3100))
    with pytest.raises(DataError, match=r"another dataset is at .*sources\.text\.inputs \(xxh3\)"):
        build(settings)
    replaced = build(settings, overwrite=True)
    assert replaced.fingerprint != built.fingerprint
    Dataset.open(tmp_path / "d").verify()
    assert len(list((tmp_path / "d").rglob("*.arrow"))) == len(replaced.shards)


def test_a_tokenizer_is_kept_but_never_used_for_other_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(3000))
    settings = config(tmp_path / "d", file)
    tokenizer = build_tokenizer(settings)
    model = tmp_path / "d" / "tokenizer" / "spm.model"
    written = model.stat().st_mtime_ns
    assert build(settings).tokenizer.sha256 == tokenizer.sha256 == build_tokenizer(settings).sha256
    assert model.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="depends on its tokenizer"):
        build_tokenizer(settings, overwrite=True)
    build_tokenizer(config(tmp_path / "e", file))
    other = config(tmp_path / "e", file, tokenizer={"vocab_size": 350, "character_coverage": 0.999})
    for attempt in (build, build_tokenizer):
        with pytest.raises(DataError, match=r"trained for other data: tokenizer.vocab_size: 400 there, 350 here"):
            attempt(other)
    assert build_tokenizer(other, overwrite=True).vocab_size == 350
    (tmp_path / "e" / "tokenizer" / "spm.model").write_bytes(model.read_bytes())
    with pytest.raises(DataError, match=r"is not the model that meta.json"):
        build(other)
    (tmp_path / "e" / "tokenizer" / "meta.json").unlink()
    with pytest.raises(DataError, match=r"has no usable meta.json"):
        build(other)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "big.txt"
    file.write_text(prose(150_000))
    return file


def test_kill_at_any_point_leaves_no_half_dataset(tmp_path: Path, big_file: Path) -> None:
    reference = config(tmp_path / "reference", big_file, shard_tokens=20_000)
    began = time.monotonic()
    wanted = build(reference).fingerprint
    longest = time.monotonic() - began
    rng = np.random.default_rng(1)
    settings = config(tmp_path / "d", big_file, shard_tokens=20_000)
    killed = 0
    while killed < 4:
        process = subprocess_build(settings)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(float(rng.uniform(0, longest)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        if (tmp_path / "d" / "manifest.json").exists():
            Dataset.open(tmp_path / "d").verify()
            shutil.rmtree(tmp_path / "d")
            longest /= 2
    (tmp_path / "d").mkdir(exist_ok=True)
    (tmp_path / "d" / ".manifest.json.1.tmp").write_text("{")  # as of a kill while the manifest was written
    assert build(settings).fingerprint == wanted
    assert files_of(tmp_path / "d") == files_of(tmp_path / "reference")


@pytest.mark.parametrize("stage", ["hash", "measure", "tokenizer", "tokenize"])
def test_interrupts_leave_the_old_dataset(tmp_path: Path, stage: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(3000))
    settings = config(tmp_path / "d", file)
    build(settings)
    before = files_of(tmp_path / "d")
    file.write_text(prose(3000, seed=2))

    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(settings, interrupt, overwrite=True)
    assert files_of(tmp_path / "d") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 400 KiB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing(small_disk: Path, big_file: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*disk.*: the disk is full") as raised:
        build(config(small_disk / "d", big_file, shard_tokens=2048))
    assert str(small_disk) in str(raised.value)
    assert not list(small_disk.rglob("*.arrow"))
    with pytest.raises(DataError, match="is not a dataset"):
        Dataset.open(small_disk / "d")


def test_a_file_size_limit_is_named(tmp_path: Path, big_file: Path) -> None:
    settings = config(tmp_path / "d", big_file)
    build_tokenizer(settings)
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, {resource.RLIM_INFINITY}))"
    process = subprocess_build(settings, limit)
    _, errors = process.communicate(timeout=60)
    assert "DataError: cannot write" in errors
    assert "file size limit" in errors
    assert not list(tmp_path.rglob("*.arrow"))
    assert build(settings).splits["train"].tokens > 300_000 // 2


def test_two_builds_at_once_do_not_mix(tmp_path: Path, big_file: Path) -> None:
    settings = config(tmp_path / "d", big_file)

    def second(stage: str, done: int, total: int) -> None:
        if stage == "tokenize":
            with pytest.raises(DataError, match="another build is at work"):
                build(settings)

    build(settings, second)
    Dataset.open(tmp_path / "d").verify()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"split": {"rule": "hash", "fraction": 0.01}}, "no text fell into the validation split.*rule=tail"),
        ({"split": {"rule": "hash", "fraction": 0.9999}}, "no text to train|no text fell into the train split"),
    ],
)
def test_unusable_settings_are_explained(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(3000))
    with pytest.raises(DataError, match=message):
        build(config(tmp_path / "d", file, **settings))


def test_the_held_out_files_hold_text_and_the_dataset_lies_outside_of_what_is_read(tmp_path: Path) -> None:
    text, held_out = tmp_path / "text" / "a.txt", tmp_path / "held-out.txt"
    text.parent.mkdir()
    text.write_text(prose(3000))
    held_out.touch()
    given = config(tmp_path / "d", text, split={"rule": "given", "files": [str(held_out)]})
    with pytest.raises(DataError, match="all documents of data.split.files are empty"):
        build(given)
    for inside in (text.parent, text.parent / "d"):
        with pytest.raises(DataError, match=r"data.path=.* lies in .*, all of which is read as text"):
            build(config(inside, text.parent))
    assert [file.name for file in text.parent.iterdir()] == ["a.txt"]


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        build(config(tmp_path / "d", tmp_path / "a.txt"))


def test_bad_bytes_stop_the_build_and_can_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(prose(3000).encode() + b"\xff\xfe end")
    with pytest.raises(DataError, match=rf"a\.txt: byte {file.stat().st_size - 6} \(0xff\).*data\.errors=replace"):
        build(config(tmp_path / "d", file))
    built = build(config(tmp_path / "d", file, errors="replace"))
    assert built.sources[0].replaced == 2
    assert texts(Dataset.open(tmp_path / "d"))["validation"][0].endswith("\ufffd\ufffd end")


def test_unknown_characters_of_a_character_tokenizer_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc\n" * 1000 + "xyz")
    built = build(config(tmp_path / "d", file, tokenizer={"type": "char"}))
    assert built.splits["validation"].unknown == 1
    assert built.splits["train"].unknown == 0


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path) -> None:
    characters = [chr(code) for code in range(0x10000, 0x10000 + 66_000)]
    file = tmp_path / "a.txt"
    file.write_text("".join(characters) + "".join(characters[:20_000]))
    built = build(config(tmp_path / "d", file, tokenizer={"type": "char", "vocab_size": 100_000}))
    assert built.dtype == "int32"
    assert built.tokenizer.vocab_size > 2**16
    assert "".join(texts(Dataset.open(tmp_path / "d"))["train"]) in file.read_text()


@pytest.mark.drill
def test_a_long_document_takes_bounded_memory(tmp_path: Path) -> None:
    """120 MB with and without newlines cost hardly more than 48 MB do, which fill the buffers: 12 MB do not always."""
    paragraph = prose(20_000, 3).encode()
    peaks = []
    for copies in (8, 20):
        for number, text in enumerate((paragraph, paragraph.replace(b"\n", b" "))):
            file = tmp_path / f"{copies}-{number}.txt"
            file.write_bytes(text * (copies * 3_000_000 // len(text)))
        settings = config(
            tmp_path / f"d{copies}",
            tmp_path / f"{copies}-0.txt",
            tmp_path / f"{copies}-1.txt",
            tokenizer={"vocab_size": 400, "character_coverage": 0.999, "sample_bytes": 100_000},
        )
        output, errors = subprocess_build(settings, PEAK).communicate(timeout=240)
        assert not errors
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 50, peaks


def test_manifests_of_unknown_format_or_damaged_are_errors(dataset: Dataset) -> None:
    path = dataset.path / "manifest.json"
    path.write_text(seal(json.dumps(unseal(path.read_bytes()) | {"format": 99})))
    with pytest.raises(DataError, match="format 99, this version reads formats 1 to 4"):
        Dataset.open(dataset.path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match=r"is not a dataset.*duet data build"):
        Dataset.open(dataset.path)
