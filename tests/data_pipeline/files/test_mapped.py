"""A shard that is truncated while it is mapped: the kernel's signal names the file, and the end is recorded."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.dataset import Dataset
from pretrain.run.journal import read
from tests.conftest import RanksFailed
from tests.data_pipeline.storage.test_changes import Ranks, trained  # noqa: F401 - a fixture
from tests.data_pipeline.storage.test_dataset import shard_path
from tests.distributed.cases import train_run
from tests.runs import ROOT

READ = """
import os, sys, threading
from data_pipeline.storage.dataset import Dataset
from data_pipeline.files.mapped import told

def work():
    shard = dataset.shard(facts)
    os.truncate(shard.path, 0)
    {read}

dataset = Dataset.open(sys.argv[1])
facts = dataset.manifest.shards[0]
with told(lambda error: print(f"error: {{error}}", file=sys.stderr)):
    {call}
print("not reached")
"""
DIRECT = "shard.tokens(0).sum()"
HASHED = "import xxhash; xxhash.xxh3_64(shard.tokens(0).data)"  # without the interpreter's lock


@pytest.mark.parametrize("read", [DIRECT, HASHED])
@pytest.mark.parametrize("call", ["work()", "threading.Thread(target=work).start(); threading.Event().wait()"])
def test_the_file_is_named(dataset: Dataset, read: str, call: str) -> None:
    program = READ.format(read=read, call=call)
    done = subprocess.run(
        [sys.executable, "-c", program, str(dataset.path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {shard_path(dataset)} was truncated while it was read: 0 bytes, " in done.stderr
    assert "not reached" not in done.stdout


def test_another_fault_stays_a_fault(dataset: Dataset) -> None:
    program = READ.format(read="os.kill(os.getpid(), 7)", call="work()").replace("os.truncate(shard.path, 0)", "")
    done = subprocess.run(
        [sys.executable, "-c", program, str(dataset.path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -7
    assert "error: a memory-mapped file could not be read (SIGBUS), and none is shorter" in done.stderr


def truncating(ranks: Any, args: list[str], shards: list[str]) -> int:
    """A run whose training shards are truncated after its second step."""
    from pretrain.engine.engine import Engine

    step, steps = Engine.train_step, 0

    def then_truncate(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 and ranks.is_first:
            for shard in shards:
                os.truncate(shard, 0)
        return step(*given)

    Engine.train_step = then_truncate  # type: ignore[method-assign, assignment]
    return train_run(ranks, args)


@pytest.mark.parametrize("world", [1, 2])
def test_the_end_of_a_run_is_recorded(
    ranks: Ranks,
    trained: Callable[[Path], list[str]],  # noqa: F811
    tmp_path: Path,
    world: int,
) -> None:
    args = [*trained(tmp_path), "train.steps=100000"]
    dataset = Dataset.open(tmp_path / "data")
    shards = [str(dataset.path / facts.path) for facts in dataset.shards_of("train")]
    with pytest.raises(RanksFailed, match="exit codes"):
        ranks(f"{__name__}:truncating", world, args=args, shards=shards)
    ends = [record for record in read(tmp_path / "run" / "metrics.jsonl") if record.kind == "end"]
    assert ends[-1].fields["status"] == "FAILED"
    assert "was truncated while it was read" in ends[-1].fields["reason"]
