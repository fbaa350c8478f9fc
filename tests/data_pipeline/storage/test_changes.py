"""A dataset that changes after the first start of a run: nothing is trained on but what the manifest describes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.storage.dataset import Dataset
from tests.conftest import RanksFailed
from tests.data_pipeline.storage.test_damage import FORMATS
from tests.data_pipeline.storage.test_dataset import shard_path, swap
from tests.distributed.cases import train_run
from tests.runs import SMALL, duet

Ranks = Callable[..., list[Any]]
STEPS = ["train.eval_every=100", "schedule.kind=constant"]


def start(ranks: Any, args: list[str], limit: int | None = None, staged: str | None = None) -> int:
    """A start of which `limit` bytes of the dataset are hashed at once; `staged`: a copy on this node."""
    from pretrain import begin

    if limit is not None:
        begin.VERIFY_UP_TO_BYTES = limit
    if staged is not None:
        os.environ["DUET_DATA"] = staged
    return train_run(ranks, args)


@pytest.fixture(scope="module")
def trained(ranks: Ranks, mixed: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """Copies a run of two steps, and its dataset, into a folder; gives what it is started by."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ranks(f"{__name__}:start", 1, args=[*SMALL, *STEPS, f"data.path={mixed.path}", f"run.dir={run}", "train.steps=2"])

    def copy(folder: Path) -> list[str]:
        shutil.copytree(run, folder / "run")
        shutil.copytree(mixed.path, folder / "data")
        return [*SMALL, *STEPS, f"data.path={folder / 'data'}", f"run.dir={folder / 'run'}"]

    return copy


def overwrite(path: Path) -> None:
    """In place, as long as before."""
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(bytes(range(7, 207)) * 3)


def in_training(dataset: Dataset) -> None:
    for facts in dataset.shards_of("train"):
        overwrite(dataset.path / facts.path)


def in_validation(dataset: Dataset) -> None:
    overwrite(dataset.path / dataset.shards_of("validation")[0].path)


def in_the_tokenizer(dataset: Dataset) -> None:
    overwrite(dataset.path / "tokenizer" / "spm.model")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("change", "limit", "message"),
    [
        (in_training, None, r"shard .*t-0000.*\.arrow: batch 0 .* does not match its hash.*; restore the file"),
        (in_training, 0, r"shard .*t-0000.*\.arrow: batch 0 .* does not match its hash"),
        (in_validation, 0, r"shard .*v-000000-.*\.arrow: batch 0 .* does not match its hash"),
        (in_the_tokenizer, 0, r"tokenizer"),
        (swap, None, r"swapped shards: .*t-00000[01]-.* has the content of train/t-00000"),
    ],
)
def test_a_run_does_not_go_on_with_data_that_changed(
    ranks: Ranks,
    trained: Callable[[Path], list[str]],
    tmp_path: Path,
    world: int,
    change: Callable[[Dataset], None],
    limit: int | None,
    message: str,
) -> None:
    args = trained(tmp_path)
    change(Dataset.open(tmp_path / "data"))
    # Hashes of what is validated on are compared when it is.
    more = ["train.steps=4", "train.eval_every=4"]
    with pytest.raises(RanksFailed, match=message):
        ranks(f"{__name__}:start", world, args=[*args, *more], limit=limit)


@pytest.mark.parametrize("limit", [None, 0])
def test_a_copy_on_the_node_is_compared_too(
    ranks: Ranks, trained: Callable[[Path], list[str]], tmp_path: Path, limit: int | None
) -> None:
    args = [*trained(tmp_path), "train.steps=4"]
    shutil.copytree(tmp_path / "data", tmp_path / "staged")
    in_training(Dataset.open(tmp_path / "staged"))
    with pytest.raises(RanksFailed, match=r"shard .*/staged/train/.* does not match its hash"):
        ranks(f"{__name__}:start", 2, args=args, limit=limit, staged=str(tmp_path / "staged"))
    ranks(f"{__name__}:start", 2, args=args, limit=limit)


@pytest.mark.parametrize("order", ["global", "block"])
def test_packed_windows_are_of_batches_that_were_compared(
    ranks: Ranks, mixed: Dataset, tmp_path: Path, order: str
) -> None:
    shutil.copytree(mixed.path, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    prepare(dataset, 16)
    overwrite(shard_path(dataset))
    args = [*SMALL, *STEPS, f"data.path={dataset.path}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    with pytest.raises(RanksFailed, match=r"shard .*t-000000-.* does not match its hash"):
        ranks(
            f"{__name__}:start",
            1,
            args=[*args, "data.packing=best_fit", f"data.order={order}", "batch.tokens=2048"],
            limit=0,
        )


def test_what_is_validated_on_later_is_what_was_trained_with(
    trained: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    done = duet("train", *trained(tmp_path), "train.steps=2")  # the run is told that its data have moved
    assert done.returncode == 0, done.stderr
    done = duet("eval", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    in_validation(Dataset.open(tmp_path / "data"))
    done = duet("eval", str(tmp_path / "run"))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "v-000000-" in done.stderr
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(FORMATS / "format2" / "text", tmp_path / "data")
    done = duet("eval", str(tmp_path / "run"))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "wrong tokenizer" in done.stderr
