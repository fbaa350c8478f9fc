"""Datasets in a store, read through a cache: a real S3 server on this machine."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import join, resolve
from data_pipeline.loading.loader import Reader
from data_pipeline.sampling import packing_plan
from data_pipeline.sampling.sample_plan import Plan, wanted_phase
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage import remote_shards
from data_pipeline.storage.dataset import BLOCK_SHARDS, Dataset
from data_pipeline.storage.manifest import MANIFEST, Manifest, ShardFacts
from data_pipeline.storage.remote_shards import RemoteShards, unused_cache, upload
from data_pipeline.storage.shard_cache import ShardCache
from tests.data_pipeline.conftest import config, prose, put
from tests.data_pipeline.inspection.test_commands import duet_data
from tests.runs import ROOT, SMALL, attempts

CONTEXT, BATCH = 32, 64


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of some 50 training shards."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "text.txt").write_text(prose(20_000), newline="")
    build(config(folder / "dataset", folder / "text.txt", shard_tokens=2048, tokenizer={"type": "char"}))
    return Dataset.open(folder / "dataset")


@pytest.fixture(scope="session")
def uri(local: Dataset, store: Callable[[str], str]) -> str:
    assert upload(Path(local.path), store("sets/one")) == len(local.manifest.shards)
    return store("sets/one")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were fetched, as often as it was tried; without pauses between attempts."""
    paths: list[str] = []
    copy = RemoteShards._copy

    def noted(self: RemoteShards, shard: ShardFacts, out: BinaryIO) -> None:
        paths.append(shard.path)
        copy(self, shard, out)

    monkeypatch.setattr(RemoteShards, "_copy", noted)
    monkeypatch.setattr(remote_shards, "_FIRST_PAUSE", 0)
    return paths


def needed(dataset: Dataset) -> int:
    """The bytes of two blocks, and of what may be open for validation."""
    found = 0
    for split, blocks in (("train", 2), ("validation", 1)):
        sizes = sorted((shard.bytes for shard in dataset.manifest.shards_of(split)), reverse=True)  # type: ignore[arg-type]
        found += sum(sizes[: blocks * (BLOCK_SHARDS + 2)])
    return found


def plan_of(dataset: Dataset, **data: Any) -> Plan:
    settings = DataConfig.model_validate({"path": "d", "order": "block", **data})
    return Plan(dataset, wanted_phase(dataset, settings, CONTEXT), 0)


def read(plan: Plan, steps: int, start: int = 0) -> list[tuple[list[int], bytes]]:
    reader = iter(Reader(plan, global_batch=BATCH, rank=0, world_size=1, start=start))
    found = [next(reader) for _ in range(steps)]
    return [(step.positions.tolist(), step.tokens.numpy().tobytes()) for step in found]


def settle(dataset: Dataset) -> None:
    """Waits for what is being fetched ahead."""
    assert dataset._remote is not None
    if dataset._remote._thread is not None:
        dataset._remote._thread.join()


def held(cache: Path) -> int:
    """Bytes in a cache, where another thread may be renaming, but not making room: a removed file is not counted beside
    what came in its place."""
    with open(cache / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while True:
            try:
                return sum(file.stat().st_size for file in cache.iterdir())
            except FileNotFoundError:
                continue


def test_a_small_cache_keeps_to_its_bytes_and_reading_stays_exact(
    local: Dataset, uri: str, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = needed(local)
    most = 0
    replace = os.replace

    def watched(old: Path, new: Path) -> None:
        nonlocal most
        replace(old, new)
        most = max(most, held(tmp_path))

    monkeypatch.setattr(os, "replace", watched)
    found = Dataset.open(uri, cache=ShardCache(tmp_path, limit))
    num_windows = len(Windows.of(local, "train", CONTEXT))
    steps = 2 * num_windows // BATCH
    assert read(plan_of(found), steps) == read(plan_of(local), steps)
    settle(found)
    shards = len(local.shards_of("train"))
    assert limit * 0.8 < most <= limit
    assert set(fetched) == {shard.path for shard in local.shards_of("train")}
    assert shards < len(fetched) <= 3 * shards  # Two epochs; few were fetched twice in one.


def test_a_warm_start_fetches_nothing_and_a_resume_only_what_it_reads(
    local: Dataset, uri: str, tmp_path: Path, fetched: list[str]
) -> None:
    limit = needed(local)
    middle = len(Windows.of(local, "train", CONTEXT)) // 2
    plan = plan_of(local)
    block = plan._orders[0].block(middle)
    following = plan._orders[0].block(block[2])
    windows = plan.windows["text"]
    assert isinstance(windows, Windows)
    paths = [{shard.path for shard in windows.shards_of(first, end)} for first, end, _ in (block, following)]
    for wanted in (paths[0] | paths[1], set()):
        fetched.clear()
        found = Dataset.open(uri, cache=ShardCache(tmp_path, limit))
        assert read(plan_of(found), 4, middle) == read(plan, 4, middle)
        settle(found)
        assert set(fetched) == wanted
        assert len(fetched) == len(wanted)
    assert len(paths[0] | paths[1]) < len(local.shards_of("train"))


def test_packing_wants_a_folder(uri: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at a URI; copy it, or set data.packing=plain"):
        packing_plan.prepare(Dataset.open(uri, cache=ShardCache(tmp_path, 2**30)), CONTEXT)


@given(st.integers(1, 400), st.integers(1, 90), st.integers(0, 1200))
def test_the_block_of_a_position_is_the_one_that_is_read(windows: int, size: int, position: int) -> None:
    order = SampleOrder("x", 0, windows, size)
    first, end, following = order.block(position)
    inside = order.windows(np.arange(position, following))
    assert 0 < following - position <= end - first <= max(size, windows if size >= windows else 0)
    assert ((first <= inside) & (inside < end)).all()
    assert order.block(following - 1)[2] == following < order.block(following)[2]


@pytest.mark.parametrize("small", [True, False])
def test_two_processes_share_a_cache(local: Dataset, uri: str, tmp_path: Path, ranks: Any, small: bool) -> None:
    limit, start = needed(local) if small else 2**30, 1000
    found = ranks(
        "tests.data_pipeline.cases:read_remote", 2, uri=uri, cache=str(tmp_path), limit=limit, steps=5, start=start
    )
    for rank, result in enumerate(found):
        reader = iter(Reader(plan_of(local), global_batch=BATCH, rank=rank, world_size=2, start=start))
        for positions, digest in result["read"]:
            step = next(reader)
            assert step.positions.tolist() == positions
            assert xxhash.xxh3_64_hexdigest(step.tokens.numpy().tobytes()) == digest
    once = [path for result in found for path in result["fetched"]]
    assert len(set(once)) >= BLOCK_SHARDS
    if not small:
        assert len(once) == len(set(once))
    assert not list(tmp_path.rglob("*.part"))
    assert held(tmp_path / "duet-cache") <= limit


def test_a_cache_removes_no_file_of_its_users(local: Dataset, uri: str, tmp_path: Path) -> None:
    """In the folder that `data.cache` names, older than all that is fetched."""
    thesis = tmp_path / "thesis.tex"
    thesis.write_bytes(b"x" * needed(local))
    os.utime(thesis, (1, 1))
    data = DataConfig(path=uri, cache=str(tmp_path), cache_bytes=needed(local), order="block")
    read(plan_of(found := Dataset.of(data)), len(Windows.of(local, "train", CONTEXT)) // BATCH)
    settle(found)
    assert thesis.exists()


def test_nobody_elses_folder_is_the_cache(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write there would choose what is trained on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ShardCache(remote_shards.default_folder(), 1).folder.stat().st_mode & 0o777 == 0o700
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    (tmp_path / f"duet-cache-{me + 1}").mkdir()  # by me
    with pytest.raises(DataError, match="another user's"):
        Dataset.of(DataConfig(path=uri))


def test_what_was_altered_in_the_cache_is_fetched_again(
    local: Dataset, uri: str, tmp_path: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    facts, limit = local.manifest.shards[0], needed(local)
    for content in (b"x" * facts.bytes, b"short"):
        found = Dataset.open(uri, cache=ShardCache(tmp_path / "cache", limit))
        found.shard(facts)
        found._open.clear()
        file = tmp_path / "cache" / f"{facts.xxh3_128}.arrow"
        file.write_bytes(content)
        again = Dataset.open(uri, cache=ShardCache(tmp_path / "cache", limit))
        assert np.array_equal(again.shard(facts).tokens(0), local.shard(facts).tokens(0))
        assert f"{file} does not match its hash" in capsys.readouterr().err
    assert fetched == [facts.path] * 3
    found.tokenizer()
    (tmp_path / "cache" / local.manifest.tokenizer.sha256).write_bytes(b"another")
    assert Dataset.open(uri, cache=ShardCache(tmp_path / "cache", limit)).tokenizer().sha256 == local.tokenizer().sha256


def test_a_kill_in_the_middle_leaves_nothing_torn(local: Dataset, uri: str, tmp_path: Path, fetched: list[str]) -> None:
    program = (
        "import os, signal, sys\n"
        "from data_pipeline.storage import remote_shards as remote\n"
        "from data_pipeline.storage.shard_cache import ShardCache\n"
        "from data_pipeline.storage.manifest import Manifest\n"
        "from pathlib import Path\n"
        "remote._PART_BYTES, add, parts = 256, remote._add, []\n"
        "def die(*part):\n"
        "    add(*part)\n"
        "    parts.append(part)\n"
        "    if len(parts) == 5:\n"
        "        part[1].flush()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "remote._add = die\n"
        "shards = remote.RemoteShards(sys.argv[1], ShardCache(Path(sys.argv[2]), 2**30))\n"
        "shards.get(Manifest.load(sys.argv[1]).shards[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, uri, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    facts = local.manifest.shards[0]
    (left,) = (file for file in tmp_path.iterdir() if file.name != ".lock")
    assert left.name == f"{facts.xxh3_128}.arrow.part"
    original = (Path(local.path) / facts.path).read_bytes()
    assert left.read_bytes()[: 5 * 256] == original[: 5 * 256]
    # What a dead process left counts, and goes first.
    cache = ShardCache(tmp_path, facts.bytes + 5000)
    cache.get("other", facts.bytes, lambda out: out.truncate())
    assert not left.exists()
    shards = RemoteShards(uri, cache)
    found = shards.get(facts)
    assert found is not None
    assert found.path.read_bytes() == original
    assert fetched == [facts.path]


def test_a_damaged_object_is_fetched_again_and_then_refused_by_name(
    local: Dataset, store: Callable[[str], str], tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = local.manifest.shards[0]
    good = (Path(local.path) / facts.path).read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    name = join(store("sets/damaged"), facts.path)
    put(name, bytes(damaged))
    shards = RemoteShards(store("sets/damaged"), ShardCache(tmp_path, 2**30))
    with pytest.raises(DataError, match=rf"shard {facts.path} of s3.*in 5 attempts: it does not match its hash"):
        shards.get(facts)
    assert fetched == [facts.path] * 5
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    put(name, good[:-8])
    with pytest.raises(DataError, match=rf"shard {facts.path} of .*it has {len(good) - 8} bytes, the manifest says"):
        shards.get(facts)
    with pytest.raises(DataError, match=rf"shard {local.manifest.shards[1].path} of .*attempts"):
        shards.get(local.manifest.shards[1])
    put(name, bytes(damaged))
    fetched.clear()
    monkeypatch.setattr(remote_shards.time, "sleep", lambda _: put(name, good) if len(fetched) == 2 else None)
    found = shards.get(facts)
    assert found is not None and found.path.read_bytes() == good
    assert len(fetched) == 3


def test_what_is_in_use_is_not_removed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)

    def get(name: str) -> Any:
        return cache.get(name, 40, lambda out: out.write(name.encode() * 40))

    first, second = get("a"), get("b")
    with pytest.raises(DataError, match=r"no room for 40 bytes in .*its limit is 100 bytes.*raise data\.cache_bytes"):
        get("c")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", ".lock"}
    second.lease.close()
    get("a").lease.close()  # The last one used, but by `first` still held.
    third = get("c")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "c", ".lock"}
    first.lease.close()
    third.lease.close()
    get("b").lease.close()
    assert {file.name for file in tmp_path.iterdir()} == {"b", "c", ".lock"}  # `a` was used before `c`.


def test_what_does_not_fit_is_said_before_anything_is_read(local: Dataset, uri: str, tmp_path: Path) -> None:
    limit = needed(local)
    for size, order, message in (
        (limit, "global", r"data\.order=global reads all shards .* set data\.order=block"),
        (limit - 1, "block", rf"data\.cache_bytes={limit - 1} is too little for s3.* are {limit} bytes"),
    ):
        with pytest.raises(DataError, match=message):
            plan_of(Dataset.open(uri, cache=ShardCache(tmp_path, size)), order=order)
    everything = sum(shard.bytes for shard in local.manifest.shards)
    plan = plan_of(Dataset.open(uri, cache=ShardCache(tmp_path, everything)), order="global")
    assert read(plan, 1) == read(plan_of(local, order="global"), 1)


def test_an_upload_is_a_dataset_when_it_is_complete(
    local: Dataset, store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, send, sent = store("sets/upload"), remote_shards._send, list[Path]()

    def breaks(file: Path, filesystem: Any, path: str) -> None:
        if len(sent) == 3:
            raise OSError("the line is cut")
        sent.append(file)
        send(file, filesystem, path)

    monkeypatch.setattr(remote_shards, "_send", breaks)
    with pytest.raises(DataError, match="cannot be written: the line is cut"):
        upload(Path(local.path), where)
    with pytest.raises(DataError, match=rf"{MANIFEST}.*cannot be read"):
        Dataset.open(where)
    monkeypatch.setattr(remote_shards, "_send", send)
    assert upload(Path(local.path), where) == len(local.manifest.shards) - 3
    assert upload(Path(local.path), where) == 0
    assert Manifest.load(where) == local.manifest
    found = Dataset.open(where, cache=ShardCache(tmp_path / "cache", 2**30))
    assert found.tokenizer().sha256 == local.tokenizer().sha256
    filesystem, path = resolve(join(where, local.manifest.shards[5].path))
    filesystem.delete_file(path)
    with pytest.raises(DataError, match=rf"shard {local.manifest.shards[5].path} of .* is missing"):
        Dataset.open(where)
    (tmp_path / "text.txt").write_text(prose(3000, 5), newline="")
    other = config(tmp_path / "other", tmp_path / "text.txt", tokenizer={"type": "char"})
    build(other)
    with pytest.raises(DataError, match="another dataset is at s3"):
        upload(tmp_path / "other", where)


def test_commands_take_a_uri(
    local: Dataset, store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(remote_shards, "_FIRST_PAUSE", 0)
    where = store("sets/commands")
    assert "shards copied" in duet_data("upload", str(local.path), where)
    assert local.manifest.fingerprint in duet_data("inspect", where, "--samples", "1")
    assert "all hashes match" in duet_data("verify", where)
    facts = local.manifest.shards[3]
    damaged = bytearray((Path(local.path) / facts.path).read_bytes())
    damaged[-1000] ^= 1
    put(join(where, facts.path), bytes(damaged))
    with pytest.raises(DataError, match=f"shard {facts.path} .*does not match its hash"):
        duet_data("verify", where)  # Though the cache, which `inspect` filled, has it as it was.
    left = [str(file.relative_to(tmp_path)) for file in tmp_path.glob("duet-verify-*/*")]
    assert left == [f"duet-verify-{os.getuid()}/lock"]
    for arguments in (("build", f"data.path={where}", "data.sources.a.paths=[x]"), ("upload", str(local.path), "x")):
        with pytest.raises(DataError, match="URI"):
            duet_data(*arguments)


def test_what_a_killed_check_of_a_dataset_has_fetched_goes_with_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed = (
        "import os, sys\nfrom data_pipeline.storage.remote_shards import unused_cache\n"
        "with unused_cache(sys.argv[1], 1) as cache:\n"
        "    (cache.folder / 'shard').touch()\n    os.kill(os.getpid(), 9)\n"
    )
    with unused_cache(uri, 1) as live:
        assert live
        assert subprocess.run([sys.executable, "-c", killed, uri], cwd=ROOT).returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("*/*/shard"))) == 1
        with unused_cache(uri, 1) as next_one:
            assert next_one
            assert {folder for folder in tmp_path.glob("*/*") if folder.is_dir()} == {live.folder, next_one.folder}


@pytest.mark.drill
def test_a_run_reads_from_a_store_as_from_a_disk(local: Dataset, uri: str, tmp_path: Path, ranks: Any) -> None:
    losses = []
    for name, where in (("local", str(local.path)), ("remote", uri)):
        args = [*SMALL, f"run.dir={tmp_path / name}", "train.steps=3", "train.eval_every=3", "data.order=block"]
        cache = [f"data.cache={tmp_path / 'cache'}", f"data.cache_bytes={needed(local)}"]
        ranks("tests.distributed.cases:train_run", 2, args=[*args, f"data.path={where}", *cache])
        ((_, steps),) = attempts(tmp_path / name / "metrics.jsonl")
        losses.append([metrics["loss/total"] for _, metrics in sorted(steps.items())])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert held(tmp_path / "cache" / "duet-cache") <= needed(local)
