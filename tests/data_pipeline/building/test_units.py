"""A build in parts: any number of processes or tasks, killed anywhere, gives the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.building import stages
from data_pipeline.building.api import build, build_task, merge, prepare
from data_pipeline.building.token_rows import RowFile, RowWriter
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.ingest import sources
from data_pipeline.ingest.splits import SPLITS
from data_pipeline.inspection.statistics import documents
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from tests.data_pipeline.conftest import REPOSITORY, config, contents, prose, stream


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: JSONL files that are divided, and many small plain files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        lines = [json.dumps({"text": prose(3 + 40 * (i % 5), 1000 * number + i)}) for i in range(120)]
        (folder / f"{number}.jsonl").write_text("\n\n".join(lines))
    (folder / "plain").mkdir()
    for number in range(60):
        (folder / "plain" / f"{number:02d}.txt").write_text(prose(number * 5, 5000 + number))
    return folder


def settings_of(corpus: Path, path: Path, **settings: object) -> DataConfig:
    two = {"lines": {"paths": [str(corpus / "*.jsonl")]}, "files": {"paths": [str(corpus / "plain")]}}
    defaults: dict[str, object] = {
        "sources": two,
        "split": {"rule": "hash", "fraction": 0.1},
        "shard_tokens": 5000,
        "tokenizer": {"type": "char"},
    }
    return config(path, **(defaults | settings))


def published(root: Path) -> dict[str, bytes]:
    assert not (root / "_work").exists()
    return {name: data for name, data in contents(root).items() if name != ".lock"}


SETTINGS: list[dict[str, object]] = [
    {},
    {"shuffle": True},
    {"split": {"rule": "tail", "fraction": 0.2}, "duplicates": {"rule": "exact"}},
]


@pytest.mark.parametrize("extra", SETTINGS, ids=["hash", "shuffle", "tail"])
def test_units_and_processes_make_no_difference(
    tmp_path: Path, corpus: Path, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(settings_of(corpus, tmp_path / "whole", **extra))
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    seen: list[tuple[str, int, int]] = []
    build(settings_of(corpus, tmp_path / "parts", **extra), lambda *told: seen.append(told))
    assert published(tmp_path / "parts") == published(tmp_path / "whole")
    crew: set[int] = set()
    build(settings_of(corpus, tmp_path / "two", **extra), lambda *_: crew.update(workers()), processes=2)
    assert published(tmp_path / "two") == published(tmp_path / "whole")
    assert len(crew) == 2, "they stay for all stages"
    assert not workers()
    for stage in ("hash", "tokenizer", "tokenize", "write"):
        done = [now for name, now, _ in seen if name == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in seen if name == stage)
    order = list(dict.fromkeys(stage for stage, *_ in seen))
    assert order[order.index("tokenizer") + 1] == "train", "said before it begins, since it may take minutes"


def rows_of(dataset: Dataset) -> dict[str, list[bytes]]:
    return {split: [np.concatenate(rows).tobytes() for rows in documents(dataset, split)] for split in SPLITS}


def test_a_shuffle_moves_whole_documents_within_their_source(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Documents are longer than a chunk here, and a range of keys spans several.
    monkeypatch.setattr("data_pipeline.building.token_rows.SORTED_CHUNK_TOKENS", 300)
    plain = build(settings_of(corpus, tmp_path / "plain"))
    moved = build(settings_of(corpus, tmp_path / "moved", shuffle=True))
    first, second = Dataset.open(tmp_path / "plain"), Dataset.open(tmp_path / "moved")
    second.verify()
    before, after = rows_of(first), rows_of(second)
    assert before["validation"] == after["validation"]
    assert before["train"] != after["train"]
    assert sorted(before["train"]) == sorted(after["train"])
    assert [source.tokens for source in moved.sources] == [source.tokens for source in plain.sources]
    lines = plain.sources[0].split_documents["train"]
    assert sorted(before["train"][:lines]) == sorted(after["train"][:lines])
    places = [before["train"].index(row) for row in after["train"][:lines]]
    assert abs(np.corrcoef(places, np.arange(lines))[0, 1]) < 0.2
    assert len(set(places)) > 0.9 * lines
    other = build(settings_of(corpus, tmp_path / "other", shuffle=True, seed=0, shard_tokens=2000))
    assert np.array_equal(
        stream(Windows.of(Dataset.open(tmp_path / "other"), "train", 10, partial=True)),
        stream(Windows.of(second, "train", 10, partial=True)),
    ), "the order depends on the seed alone"
    assert len(other.shards) > len(moved.shards)


def test_what_was_finished_is_not_done_again(
    tmp_path: Path, corpus: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(corpus, tmp_path / "d", split={"rule": "tail", "fraction": 0.1})
    build(settings_of(corpus, tmp_path / "reference", split={"rule": "tail", "fraction": 0.1}))
    calls: list[str] = []
    for name in ("look_at", "sample_text", "tokenize"):

        def watched(*args: object, name: str = name) -> object:
            calls.append(name)
            if len(calls) in (5, 22, 45):
                raise KeyboardInterrupt
            return getattr(stages, name)(*args)

        monkeypatch.setattr(f"data_pipeline.building.pipeline.{name}", watched)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            build(settings)
        assert not (tmp_path / "d" / "manifest.json").exists()
    build(settings)
    units = calls.count("sample_text") - 1  # Interrupted once, in the middle.
    assert calls.count("look_at") == calls.count("tokenize") == len(list_units(settings)) + 1 < units + 20
    assert published(tmp_path / "d") == published(tmp_path / "reference")


def list_units(settings: DataConfig) -> list[sources.Unit]:
    from data_pipeline.ingest.splits import Corpus

    return Corpus(settings).units()


def test_work_for_other_text_is_of_no_use(tmp_path: Path, corpus: Path, small_units: None) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(settings_of(corpus, tmp_path / "d"), interrupt)
    assert list((tmp_path / "d" / "_work").glob("*.rows"))
    other = settings_of(corpus, tmp_path / "d", errors="replace")
    build(other)
    build(settings_of(corpus, tmp_path / "e", errors="replace"))
    assert published(tmp_path / "d") == published(tmp_path / "e")


@pytest.mark.parametrize("steps", ["at once", "in tasks"])
def test_a_failed_build_does_not_block_what_its_error_advises(tmp_path: Path, steps: str) -> None:
    """A second try of the same settings takes the tokenizer that was trained already."""
    file = tmp_path / "a.txt"
    file.write_text(prose(3000))

    def attempt(stages: list[str], **split: object) -> None:
        settings, told = config(tmp_path / "d", file, split=split), lambda stage, done, total: stages.append(stage)
        if steps == "at once":
            build(settings, told)
            return
        prepare(settings, told)
        build_task(settings, 0, 1)
        merge(settings)

    stages: list[str] = []
    with pytest.raises(DataError, match=r"data\.split\.rule=tail"):
        attempt(stages, rule="hash")
    assert "tokenizer" in stages
    again: list[str] = []
    with pytest.raises(DataError, match=r"data\.split\.rule=tail"):
        attempt(again, rule="hash")
    assert "tokenizer" not in again
    attempt([], rule="tail")
    build(config(tmp_path / "e", file, split={"rule": "tail"}))
    assert published(tmp_path / "d") == published(tmp_path / "e")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_what_is_damaged_in_the_work_is_done_again_or_named(
    tmp_path: Path, corpus: Path, small_units: None, content: bytes
) -> None:
    settings, work = settings_of(corpus, tmp_path / "d", duplicates={"rule": "exact"}), tmp_path / "d" / "_work"
    prepare(settings)
    (work / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json is damaged .*--prepare"):
        build_task(settings, 0, 1)
    prepare(settings)
    (work / "000001.json").write_bytes(content)
    (work / "000000.verdicts.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"000000\.verdicts\.npz is damaged .*remove the folder .*_work"):
        build_task(settings, 0, 1)
    shutil.rmtree(work)
    build(settings)


def test_a_damaged_file_of_the_work_is_found(tmp_path: Path, corpus: Path, small_units: None) -> None:
    for shuffle in (False, True):
        settings = settings_of(corpus, tmp_path / f"{shuffle}", shuffle=shuffle)

        def spoil(stage: str, done: int, total: int, settings: DataConfig = settings) -> None:
            file = Path(settings.path, "_work", "000002.train.rows")
            if stage == "tokenize" and done == total and not file.with_suffix(".spoiled").exists():
                file.with_suffix(".spoiled").touch()
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)

        with pytest.raises(DataError, match=r"000002\.train\.rows: chunk \d+ does not match its hash"):
            build(settings, spoil)


def test_text_without_tokens_keeps_document_bounds(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "a.rows", np.dtype(np.uint16), by_key=False)
    empty, eos = np.array([], np.int32), np.array([1])
    for ids, starts in (([5, 6], True), (eos, False), (empty, True), (eos, False), (empty, True), ([7], False)):
        writer.append(np.array(ids), starts, 0)
    writer.finish()
    chunk = RowFile(tmp_path / "a.rows").chunk(0)
    assert chunk.tokens.tolist() == [5, 6, 1, 1, 7]
    assert chunk.bounds.tolist() == [0, 3, 4, 5]
    assert chunk.starts.all()


def test_tasks_on_many_machines_give_the_same_dataset(tmp_path: Path, corpus: Path, small_units: None) -> None:
    build(settings_of(corpus, tmp_path / "reference"))
    settings = settings_of(corpus, tmp_path / "d")
    with pytest.raises(DataError, match="nothing is prepared in .*--prepare"):
        build_task(settings, 0, 3)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "tokenizer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings, interrupt)
    with pytest.raises(DataError, match="nothing is prepared"):
        build_task(settings, 0, 3)
    units = prepare(settings)
    with pytest.raises(DataError, match=rf"^{units} of {units} units are not tokenized yet: 0, 1, 2"):
        merge(settings)
    shares = [build_task(settings, task, 3) for task in (2, 0)]
    with pytest.raises(DataError, match=r"units are not tokenized yet: 1, 4, 7.*Unit U is the work of task U modulo"):
        merge(settings)
    with pytest.raises(DataError, match="prepared for other settings: seed: 0 there, 1 here"):
        build_task(settings_of(corpus, tmp_path / "d", seed=1), 1, 3)
    shares.append(build_task(settings, 1, 3, processes=2))
    assert sum(shares) == units
    manifest = merge(settings)
    assert published(tmp_path / "d") == published(tmp_path / "reference")
    for step in (prepare, lambda settings: merge(settings.model_copy(update={"seed": 1}))):
        with pytest.raises(DataError, match="a dataset is at .* already"):
            step(settings)
    with pytest.raises(DataError, match="listed while it is built"):
        merge(settings, dropped=tmp_path / "list")
    left = (tmp_path / "d" / "_work" / "000000.train.rows", tmp_path / "d" / "train" / "t-000000-00000000.arrow")
    for file in left:  # by a merge that was killed when the dataset was there
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert merge(settings) == manifest
    assert published(tmp_path / "d") == published(tmp_path / "reference")
    assert not any(file.exists() for file in left)


def test_a_text_that_changes_under_a_task_is_named(tmp_path: Path, small_units: None) -> None:
    (tmp_path / "a.txt").write_text(prose(3000))
    settings = config(tmp_path / "d", tmp_path / "a.txt", tokenizer={"type": "char"})
    prepare(settings)
    (tmp_path / "a.txt").write_text(prose(3001))
    with pytest.raises(DataError, match=r"a\.txt changed while it was read"):
        build_task(settings, 0, 1)


PROGRAM = """
import signal, sys
from data_pipeline.ingest import sources
from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
sources.UNIT_BYTES = 20_000
def wait_before_the_end(stage, done, total):
    if stage == "write":
        signal.pause()
if __name__ == "__main__":
    build(DataConfig.model_validate_json(sys.argv[1]), wait_before_the_end, processes=2)
"""


def children(process: int) -> list[int]:
    """Processes that `process` started, and theirs."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    yield path


def test_killed_builds_leave_no_process_and_go_on(
    tmp_path: Path, corpus: Path, program: Path, small_units: None
) -> None:
    build(settings_of(corpus, tmp_path / "reference"))
    settings = settings_of(corpus, tmp_path / "d")
    work, chance = tmp_path / "d" / "_work", random.Random(0)
    for round_ in range(2):
        process = subprocess.Popen(
            [sys.executable, str(program), settings.model_dump_json()],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.DEVNULL,
        )
        # At a random unit in the middle.
        wanted = chance.randint(1, 5) + 8 * round_
        deadline = time.monotonic() + 120
        while len(list(work.glob("*.rows"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        family = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 120
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not [member for member in family if alive(member)]
        assert not (tmp_path / "d" / "manifest.json").exists()
    assert build(settings).fingerprint == build(settings_of(corpus, tmp_path / "reference")).fingerprint
    assert published(tmp_path / "d") == published(tmp_path / "reference")


def test_a_worker_that_is_killed_is_reported_and_an_error_is_raised_as_it_was(tmp_path: Path, corpus: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(3):
        (bad / f"{number}.jsonl").write_text('{"text": "fine"}\n' * 2000)
    (bad / "9.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 20_000)
        with pytest.raises(DataError, match=r"9\.jsonl, line 2 is not a JSON object"):
            build(config(tmp_path / "d", bad / "*.jsonl", tokenizer={"type": "char"}), processes=2)
        killed: list[int] = []

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "tokenize" and (family := workers()) and not killed:
                killed.append(family[0])
                os.kill(family[0], signal.SIGKILL)

        with pytest.raises(DataError, match=r"a worker process ended with exit code -9.*fewer --processes"):
            build(settings_of(corpus, tmp_path / "e"), kill, processes=2)
        assert killed


def workers() -> list[int]:
    """Processes that work for this one."""
    return [child for child in children(os.getpid()) if is_worker(child) and alive(child)]


def is_worker(process: int) -> bool:
    """Whether the fork server forked it: it has the fork server's command line, and a parent that has it too."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        return b"forkserver" in line and b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
