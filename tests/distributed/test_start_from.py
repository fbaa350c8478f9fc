"""A new run that begins with another run's checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from launch.cli import app
from pretrain.config.schema import load
from pretrain.run import origin
from pretrain.run.checkpoint_folder import needed_by
from pretrain.run.journal import read
from pretrain.run.run_folder import RunFolder
from tests.checkpoints import age
from tests.conftest import RanksFailed
from tests.runs import SMALL, attempts

Ranks = Callable[..., list[Any]]
TRAIN = "tests.distributed.cases:train_run"
STEPS, COOLDOWN = 12, 4
COOL = ("schedule.kind=wsd", f"schedule.cooldown={COOLDOWN}", f"train.steps={STEPS}")


def arguments(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        "train.checkpoint_every=4",
        "train.keep_checkpoints=9",
        *more,
    ]


@pytest.fixture(scope="module")
def stable(ranks: Ranks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of constant learning rate that is longer than the one that cools down: two ranks, ZeRO 1."""
    run_dir = tmp_path_factory.mktemp("stable") / "run"
    ranks(TRAIN, 2, args=arguments(dataset, run_dir, "schedule.kind=wsd", "train.steps=16"))
    return run_dir


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step, as they count."""
    return {
        step: (metrics["loss/total"], metrics["optim/grad_norm"])
        for _, steps in attempts(run_dir / "metrics.jsonl")
        for step, metrics in steps.items()
    }


def begin(stable: Path, run_dir: Path, *more: str, at: int | None = STEPS - COOLDOWN) -> list[str]:
    start = f"{stable}@{at}" if at else str(stable)
    return [
        str(stable / "config.yaml"),
        "run.name=cooled",
        f"run.dir={run_dir}",
        f"run.start_from={start}",
        *COOL,
        *more,
    ]


def test_a_cooldown_from_a_checkpoint_is_bitwise_the_run_that_cooled_down_itself(
    ranks: Ranks, dataset: Path, stable: Path, tmp_path: Path
) -> None:
    whole, cooled = tmp_path / "whole", tmp_path / "cooled"
    ranks(TRAIN, 2, args=arguments(dataset, whole, *COOL))
    ranks(TRAIN, 2, args=begin(stable, cooled))
    expected = losses(whole)
    start = STEPS - COOLDOWN
    assert losses(cooled) == {step: expected[step] for step in range(start + 1, STEPS + 1)}
    assert losses(stable)[STEPS] != expected[STEPS], "the cool-down changes what is learned"
    [first] = [record for record in read(cooled / "metrics.jsonl") if record.kind == "start"]
    recorded = f"{stable}@{start}"
    assert first.fields["start_from"] == first.fields["config"]["run"]["start_from"] == recorded
    assert first.fields["resumed_from"] == start
    assert json.loads((cooled / "run.json").read_text())["start_from"] == recorded
    [(_, steps)] = attempts(cooled / "metrics.jsonl")
    assert steps[STEPS]["data/tokens_seen"] == STEPS * 128


@pytest.mark.drill
def test_it_goes_on_from_its_own_checkpoints_even_when_its_origin_is_gone(
    ranks: Ranks, stable: Path, tmp_path: Path
) -> None:
    reference, killed, moved = tmp_path / "reference", tmp_path / "killed", tmp_path / "moved"
    ranks(TRAIN, 2, args=begin(stable, reference, "train.checkpoint_every=1"))
    with pytest.raises(RanksFailed, match="-9"):
        ranks(TRAIN, 2, args=begin(stable, killed, "train.checkpoint_every=2"), die_at=9)
    with pytest.raises(RanksFailed, match="-9"):  # none of its own yet: again from the origin
        ranks(TRAIN, 2, args=[str(killed / "config.yaml")], die_at=12)
    stable.rename(moved)
    try:
        ranks(TRAIN, 2, args=[str(killed / "config.yaml")])
    finally:
        moved.rename(stable)
    assert [start for start, _ in attempts(killed / "metrics.jsonl")] == [8, 8, 10]
    assert losses(killed) == losses(reference)


def test_without_a_step_it_is_the_newest_and_stays_it(ranks: Ranks, stable: Path, tmp_path: Path) -> None:
    """From another stage and number of ranks, too."""
    args = begin(stable, tmp_path / "new", "engine.zero_stage=3", "schedule.cooldown=2", "train.steps=18", at=None)
    newest = stable / "checkpoints" / "step-000000016"
    with pytest.raises(RanksFailed, match="-9"):
        ranks("tests.distributed.life_cases:train_what_is_held", 2, args=args, checkpoint=str(newest), die_at=18)
    assert needed_by(newest) == [str(tmp_path / "new")]
    newest.rename(tmp_path / "hidden")
    try:
        with pytest.raises(RanksFailed, match=f"{stable}: no complete checkpoint of step 16; there are: 1, 4, 8, 12"):
            ranks(TRAIN, 1, args=args)
    finally:
        (tmp_path / "hidden").rename(newest)
    ranks(TRAIN, 1, args=args)
    assert sorted(losses(tmp_path / "new")) == [17, 18]
    assert needed_by(newest) == [], "it has checkpoints of its own"
    assert load([str(tmp_path / "new" / "config.yaml")]).run.start_from == f"{stable}@16"


MISTAKES = [
    (["model.width=32"], "model.width: 16 in the run, 32 now"),
    (["run.seed=1"], "run.seed: 1337 in the run, 1 now"),
    (["batch.tokens=256"], "batch.tokens: 128 in the run, 256 now"),
    (["optimizer.weight_decay=0"], "optimizer.weight_decay: 0.1 in the run, 0.0 now"),
    (["train.steps=8"], "train.steps=8 counts from the origin's start, and its checkpoint is of step 8 already"),
    (["train.steps=11"], "would begin at step 7, before the checkpoint of step 8; give train.steps=12"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_what_may_not_differ_from_the_origin_is_named(
    stable: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        origin.check(load(begin(stable, tmp_path / "new", *more)), RunFolder(stable).facts()["dataset"])
    assert message in str(caught.value)


def test_a_run_that_may_not_begin_leaves_no_run(ranks: Ranks, stable: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="model.width: 16 in the run, 32 now"):
        ranks(TRAIN, 1, args=begin(stable, tmp_path / "new", "model.width=32"))
    assert not (tmp_path / "new" / "run.json").exists()
    with pytest.raises(UserError, match="dataset .* is dataset eeeeeeeeeeee"):
        origin.check(load(begin(stable, tmp_path / "new")), {"fingerprint": "e" * 64, "path": "elsewhere"})


def test_the_command_says_what_it_would_do(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def plan(*args: str) -> str:
        result = CliRunner().invoke(app, ["train", *args, "--dry-run"])
        assert result.exception is None or isinstance(result.exception, UserError)
        return result.output or str(result.exception)

    said = plan("--from", f"{stable}@8", "run.name=new", *COOL, "optimizer.lr=0.005")
    assert "run        runs/new (new)\n" in said
    assert f"begins at  {stable}@8\n" in said
    for args, message in (
        (
            ("--from", f"{stable}@7", "run.name=new", *COOL),
            "no complete checkpoint of step 7; there are: 1, 4, 8, 12, 16",
        ),
        (("--from", f"{stable}@8", *COOL), "the run itself; give the new one a name: run.name=NEW"),
        (("--from", "nowhere@8", "run.name=new"), "nowhere: not a run folder"),
    ):
        assert message in plan(*args)
    assert not list(tmp_path.iterdir())


def older_version(run_dir: Path) -> None:
    """As if the checkpoints had been saved when labels weighed alike within a micro-batch only."""
    for file in run_dir.glob("checkpoints/*/manifest.json"):
        age(file.parent)


def test_a_run_of_an_older_version_goes_on_only_where_labels_weigh_as_they_did(
    ranks: Ranks, dataset: Path, tmp_path: Path
) -> None:
    """With unequal numbers of labels it is refused, and a new run may begin with it."""
    plain, uneven, new = (tmp_path / name for name in ("plain", "uneven", "new"))
    for run_dir, more in ((plain, []), (uneven, ["data.mask_boundaries=true"])):
        args = arguments(dataset, run_dir, "schedule.kind=wsd", *more)
        ranks(TRAIN, 1, args=[*args, "train.steps=4"])
        older_version(run_dir)
        args = [*args, "train.steps=6"]
        if run_dir == plain:
            ranks(TRAIN, 1, args=args)
            assert losses(plain).keys() == {*range(1, 7)}
        else:
            with pytest.raises(RanksFailed, match=rf"RunError.*--from {uneven}@4 run.dir=NEW"):
                ranks(TRAIN, 1, args=args)
            ranks(TRAIN, 1, args=[*args, f"run.dir={new}", f"run.start_from={uneven}@4"])
            assert losses(new).keys() == {5, 6}
