"""What is left out is left out exactly, counted by reason, and listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig, DuplicateConfig, FilterConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest import sources
from data_pipeline.ingest.duplicates import NearKeys, best_bands, copies
from data_pipeline.ingest.filters import Filter
from data_pipeline.ingest.readers import Message, ReadCounts, conversation_of, document_of
from data_pipeline.inspection.statistics import documents
from data_pipeline.storage.dataset import Dataset
from tests.data_pipeline.conftest import config, prose


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings_of(path: Path, *files: Path, **source: object) -> DataConfig:
    extra = {key: source.pop(key) for key in ("duplicates", "split") if key in source}
    return config(
        path,
        sources={"s": {"paths": [str(file) for file in files], **source}},
        tokenizer={"type": "char"},
        **{"split": {"rule": "tail", "fraction": 1e-6}, **extra},
    )


def kept(settings: DataConfig) -> list[str]:
    """The documents that stayed; the last character, which `tail` holds out, is put back."""
    dataset = Dataset.open(settings.path)
    tokenizer = dataset.tokenizer()
    found = [tokenizer.decode(np.concatenate(rows)) for rows in documents(dataset, "train")]
    (held,) = [tokenizer.decode(np.concatenate(rows)) for rows in documents(dataset, "validation")]
    return [*found[:-1], found[-1] + held]


def is_wanted(text: str, record: dict[str, Any]) -> bool:
    """What a user may write."""
    if text == "fail":
        raise ValueError("cannot say")
    return "bad" not in text and record.get("score", 1) > 0.5


RECORDS = [
    {"text": "a" * 9, "language": "en", "score": 1},
    {"text": "b" * 10, "language": "en", "score": 1},
    {"text": "漢" * 20, "language": "en", "score": 1},
    {"text": "c" * 21, "language": "en", "score": 1},
    {"text": "", "language": "en", "score": 1},
    {"text": "d" * 15, "language": "de", "score": 1},
    {"text": "e bad bad bad", "language": "en", "score": 1},
    {"text": "f" * 12, "language": "en", "score": 0},
    {"text": "g" * 12 + "\n" * 3, "language": "en", "score": 1},
    {"text": "the last one", "language": "en", "score": 1},
]
KEPT = [RECORDS[i]["text"] for i in (1, 2, 8, 9)]
REASONS = {"empty": 1, "min_chars": 1, "max_chars": 1, "language": 1, "function": 2}
FILTER = {"min_chars": 10, "max_chars": 20, "language": "en", "function": f"{__name__}:is_wanted"}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_left_out_is_counted_and_listed(
    tmp_path: Path, form: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 150)
    if form == "jsonl":
        file = write(tmp_path / "a.jsonl", RECORDS)
    else:
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(RECORDS), file, row_group_size=3)
    settings = settings_of(tmp_path / "d", file, filter=FILTER)
    built = build(settings, processes=processes, dropped=tmp_path / "list" / "dropped.jsonl")
    assert kept(settings) == KEPT
    assert built.sources[0].dropped == REASONS
    assert built.sources[0].documents == len(KEPT)
    listed = [json.loads(line) for line in (tmp_path / "list" / "dropped.jsonl").read_text().splitlines()]
    place = "line" if form == "jsonl" else "row"
    assert [(item[place], item["reason"]) for item in listed] == [
        (1, "min_chars"),
        (4, "max_chars"),
        (5, "empty"),
        (6, "language"),
        (7, "function"),
        (8, "function"),
    ]
    assert {(item["source"], item["file"]) for item in listed} == {("s", str(file))}
    with pytest.raises(DataError, match="is built already"):
        build(settings, dropped=tmp_path / "again.jsonl")


def test_filters_that_cannot_work_are_explained(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "fail"}, {"text": "fine"}])
    for bad, message in (
        ({"function": "no.such.module:keep"}, r"data\.sources\.s\.filter\.function=no\.such.*PYTHONPATH"),
        ({"function": "json:nothing"}, r"json has no function 'nothing'"),
        ({"function": "json:__name__"}, r"is a str, not a function"),
        ({"function": f"{__name__}:is_wanted"}, r"failed on .*a\.jsonl.*1.*ValueError\('cannot say'\)"),
        ({"language": "en"}, r"a\.jsonl.* has no key 'language', which data\.sources\.s\.filter\.language looks at"),
    ):
        with pytest.raises(DataError, match=message):
            build(settings_of(tmp_path / "d", file, filter=bad))
    with pytest.raises(ValueError, match="max_chars=2 is below min_chars=3"):
        FilterConfig(min_chars=3, max_chars=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_function_in_a_file_is_part_of_what_a_dataset_is_made_from(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has the name of a package of ours; both are needed."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 150)
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.jsonl", RECORDS)
    own = tmp_path / "model.py"
    own.write_text(
        "import dataclasses\n\n@dataclasses.dataclass\nclass Rule:\n    word: str\n\n"
        "def keep(text, record):\n    return Rule('bad').word not in text\n"
    )
    settings = settings_of(tmp_path / "d", file, filter={"function": "model.py:keep"})
    assert build(settings, processes=processes).sources[0].dropped == {"empty": 1, "function": 1}
    assert "model.py:keep (xxh3 " in (tmp_path / "d" / "manifest.json").read_text()
    assert not (tmp_path / "__pycache__").exists()
    (tmp_path / "moved").mkdir()
    moved = own.rename(tmp_path / "moved" / "model.py")
    again = settings_of(tmp_path / "d", file, filter={"function": f"{moved}:keep"})
    build(again, processes=processes)  # the same, so it is there
    moved.write_text(moved.read_text().replace("'bad'", "'bbb'"))  # as long as before, and as old
    with pytest.raises(DataError, match=r"filter\.function.*model\.py:keep \(xxh3"):
        build(again, processes=processes)
    other = settings_of(tmp_path / "e", file, filter={"function": "moved/model.py:keep"})
    assert build(other, processes=processes).sources[0].dropped == {"empty": 1, "function": 1}
    assert "e bad bad bad" in kept(other)


def test_a_file_of_a_function_that_cannot_be_used_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "fine, too"}])
    for text, message in (
        (None, rf"function=own\.py:keep: {tmp_path}/own\.py: No such file"),
        ("keep = 1\n", r"function=own\.py:keep is a int, not a function"),
        ("def other(): pass\n", r"own\.py has no function 'keep'"),
        ("\nkeep = \n", r"function=own\.py:keep: own\.py, line 2: SyntaxError"),
        ("import math\n\nkeep = math.no\n", r"own\.py, line 3: AttributeError.*'no'"),
        ("import no_such_module\n", r"own\.py, line 1: ModuleNotFoundError.*no_such_module"),
        ("def fail():\n    return 1 / 0\n\nfail()\n", r"own\.py, line 2: ZeroDivisionError"),
        ("raise SystemExit(3)\n", r"own\.py, line 1: SystemExit\(3\)"),
    ):
        if text is not None:
            (tmp_path / "own.py").write_text(text)
        with pytest.raises(DataError, match=message):
            build(settings_of(tmp_path / "d", file, filter={"function": "own.py:keep"}))


def test_plain_documents_are_filtered_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    texts = {f"{number}.txt": "x" * 100_000 * number + "." for number in range(5)}
    for name, text in texts.items():
        (tmp_path / "t" / name).write_text(text)
    monkeypatch.setattr("data_pipeline.ingest.filters.MAX_LINE_BYTES", 250_000)
    lengths = {"min_chars": 2, "max_chars": 350_000}
    settings = settings_of(tmp_path / "d", tmp_path / "t", filter=lengths)
    assert build(settings).sources[0].dropped == {"min_chars": 1, "max_chars": 1}
    assert kept(settings) == [texts["1.txt"], texts["2.txt"], texts["3.txt"]]
    with pytest.raises(DataError, match=r"3\.txt.* is longer than 250000 bytes, which .*function"):
        build(settings_of(tmp_path / "e", tmp_path / "t", filter={**lengths, "function": f"{__name__}:is_wanted"}))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_of_equal_documents_stays(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    texts = [prose(10, n % 37) + ("" if n % 3 else f"{n % 50}") for n in range(200)]
    first = write(tmp_path / "1.jsonl", [{"text": text} for text in texts])
    (tmp_path / "2.txt").write_text(texts[5])
    (tmp_path / "3.txt").write_text(texts[5] + " ")
    wanted = list(dict.fromkeys([*texts, texts[5] + " "]))
    settings = settings_of(tmp_path / "d", first, tmp_path / "2.txt", tmp_path / "3.txt", duplicates={"rule": "exact"})
    built = build(settings, processes=processes)
    assert kept(settings) == wanted
    assert built.sources[0].dropped == {"duplicate": 202 - len(wanted)}


def test_a_copy_of_training_text_is_no_validation_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", [{"text": prose(10, n)} for n in range(9)])
    held = write(tmp_path / "held.jsonl", [{"text": prose(10, n)} for n in (3, 100)])
    split = {"rule": "given", "files": [str(held)]}
    built = build(settings_of(tmp_path / "d", text, duplicates={"rule": "exact"}, split=split))
    assert built.sources[1].dropped == {"duplicate": 1}
    assert built.splits["validation"].documents == 1


def test_the_same_letters_told_apart_elsewhere_are_no_copy() -> None:
    looks = Filter(FilterConfig(), "filter", needs_text=False)
    roles = [("user", "assistant"), ("system", "assistant"), ("user", "assistant")]
    texts = [("1", "11"), ("1", "11"), ("11", "1")]
    said = [[*map(Message, who, what)] for who, what in zip(roles, texts, strict=True)]
    documents = [*(conversation_of(0, 1, told, {}) for told in [*said, said[0]])]
    documents += [document_of(0, 1, pair, {}) for pair in (["1", "11"], ["11", "1"], ["111"])]
    digests = [looks.facts(document, "here", ReadCounts()).digest for document in documents]
    assert digests[3] == digests[0]
    assert len(set(digests)) == 6


@pytest.mark.parametrize("partition", [1, 2, 7, 1000])
def test_copies_are_what_a_set_would_find(partition: int) -> None:
    rng = np.random.default_rng(partition)
    units = [[(int(a), int(b)) for a, b in rng.integers(0, 6, (size, 2))] for size in (9, 0, 30, 1, 12)]
    stays = rng.random(sum(map(len, units))) < 0.7
    keys = [np.array(unit, np.uint64).reshape(-1, 2) for unit in units]
    seen: set[tuple[int, int]] = set()
    wanted = []
    for key, stay in zip([key for unit in units for key in unit], stays, strict=True):
        wanted.append(bool(stay) and key in seen)
        if stay:
            seen.add(key)
    assert copies(keys, stays, partition).tolist() == wanted


def test_near_duplicates_go_and_others_stay(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    originals = [" ".join(f"w{word}" for word in np.random.default_rng(n).integers(0, 5000, 300)) for n in range(30)]
    similar = [text.replace(text.split()[150], "changed", 1) + " tail" for text in originals[:15]]
    half = [" ".join([*originals[20].split()[:150], *(f"x{i}" for i in range(150))])]
    file = write(
        tmp_path / "a.jsonl", [{"text": text} for text in [*originals, *similar, *half, originals[3], "w1 w2"]]
    )
    settings = settings_of(tmp_path / "d", file, duplicates={"rule": "near"})
    built = build(settings)
    assert kept(settings) == [*originals, *half, "w1 w2"]
    assert built.sources[0].dropped == {"duplicate": 1, "near duplicate": 15}


def test_bands_detect_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.9):
        bands, rows = best_bands(threshold, 128)
        assert bands * rows <= 128
        detected = [1 - (1 - s**rows) ** bands for s in (threshold - 0.2, threshold + 0.09)]
        assert detected[0] < 0.25 < 0.75 < detected[1]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(DataError, match=r"needs the library rensa: pip install 'duet-pretrain\[near\]'"):
        NearKeys(DuplicateConfig(rule="near"))
