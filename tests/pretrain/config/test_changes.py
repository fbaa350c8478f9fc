"""What a resume may change, and that what it may change leaves what is learned as it was."""

import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from data_pipeline import may_change
from data_pipeline.errors import RunError
from data_pipeline.may_change import MayChange
from pretrain.config.changes import mark_of, refused
from pretrain.config.schema import differences, load
from pretrain.run import run_summary
from pretrain.run.journal import Journal, read
from pretrain.run.run_folder import RunFolder
from tests.conftest import RanksFailed
from tests.runs import SMALL, attempts

TRAIN = "tests.distributed.cases:train_run"


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, MayChange | None]]:
    """Every key of a configuration that holds one of each kind, with what its field says."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and value:
            for key, inner in value.items():
                if isinstance(inner, BaseModel):
                    yield from leaves(inner, f"{prefix}{name}.{key}.")
                else:
                    yield f"{prefix}{name}.{key}", mark_of(field)
        else:
            yield f"{prefix}{name}", mark_of(field)


def changed(config: Any, key: str) -> Any:
    """The configuration with another value of a key, whether the rest agrees or not."""
    name, _, rest = key.partition(".")
    if isinstance(config, dict):
        return config | {name: changed(config[name], rest) if rest else config[name] + 1}
    value = getattr(config, name)
    if rest:
        new = changed(value, rest)
    elif isinstance(value, bool):
        new = not value
    elif isinstance(value, int | float):
        new = value + 1
    else:
        new = "other"
    return config.model_copy(update={name: new})


WHOLE = load(["data.sources.web.paths=[a]", "data.weights.web=1"])
MARKS = dict(leaves(WHOLE))
LEARNED_FROM = ("data.objective", "data.mask_boundaries", "engine.precision")
"""Keys of sections of which most others may change."""


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("key", MARKS)
def test_each_key_may_change_at_a_resume_or_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """Only what its field lets change, and none of what is learned from."""
    dataset = {"fingerprint": "f" * 64, "path": "data/x"}
    folder = RunFolder(tmp_path)
    folder.claim(WHOLE, dataset)
    journal = Journal(folder.journal, 1)
    journal.metrics(1, {"loss/train": 1.0})
    journal.close()
    other = changed(WHOLE, key)
    assert list(differences(WHOLE, other)) == [key]
    mark = MARKS[key]
    if mark and mark.on_resume:
        assert key not in LEARNED_FROM
        assert not key.startswith(("model.", "optimizer.", "schedule.", "run.seed", "batch.tokens"))
        folder.claim(other, dataset)
        return
    (folder.checkpoints / "step-000000001").mkdir(parents=True)
    (folder.checkpoints / "step-000000001" / "manifest.json").touch()
    with pytest.raises(RunError) as caught:
        folder.claim(other, dataset)
    assert f"  {key}: " in str(caught.value)
    way_on = shlex.join(["duet", "train", "--from", f"{tmp_path}@1", "run.name=NEW"])
    assert (way_on in str(caught.value)) == (mark is not None), "what may differ in a new run from a checkpoint"


def test_a_key_may_not_change_unless_its_field_says_so() -> None:
    """Of a model only what its weights do without; and each reason that there is, is some key's."""
    marks = MARKS | dict(leaves(load(["model.architecture=refined"])))
    assert {mark.why for mark in marks.values() if mark} == {
        value.why for value in vars(may_change).values() if isinstance(value, MayChange)
    }
    assert [key for key, mark in marks.items() if mark and key.startswith("model.")] == ["model.refine.steps"]


def test_sources_that_come_and_go_are_told_by_name() -> None:
    """A source of any name, also one with a dot in it, may come and go: the dataset is what counts."""
    bare = load([])
    assert not refused(bare, WHOLE)
    assert not refused(WHOLE, bare)
    odd = bare.model_copy(update={"data": bare.data.model_copy(update={"weights": {"a.b": 1.0}})})
    assert list(differences(bare, odd)) == ["data.weights", "data.weights.a.b"]
    assert not refused(bare, odd)


EXACT = [
    [
        *("train.log_every=3", "train.eval_every=2", "train.checkpoint_every=2", "train.keep_checkpoints=1"),
        *("train.keep_every=5", "train.sample_tokens=4", "profile.steps=[7,8]", "tracking.mode=offline"),
        *("tracking.experiment=other", "health.max_skipped=3", "health.on_spike=skip", "health.spike_z=5"),
        *("health.spike_window=9", "health.max_rollbacks=2", "health.gc_every=1", "health.hang_minutes=2"),
        *("data.cache_bytes=1000000", "data.sources.web.paths=[nowhere]", "data.sources.web.text_key=body"),
        *("data.tokenizer.vocab_size=99", "data.split.rule=tail", "data.duplicates.rule=exact", "data.shuffle=true"),
        *("data.errors=replace", "data.seed=9", "data.shard_tokens=2048", "data.exhausted=drop"),
    ],
    ["health.on_spike=rollback", "engine.offload=cpu", "engine.timeout_minutes=5"],
    ["engine.activation_checkpointing=true"],
]
TO_ROUNDING = [["batch.micro_batch=2"], ["engine.zero_stage=0"], ["engine.zero_stage=3"]]
REFUSED = ["data.mask_boundaries=true", "engine.precision=bf16", "data.order=block"]


@pytest.fixture(scope="module")
def stopped(ranks: Callable[..., list[Any]], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 5, and beside it one that was not."""
    folder = tmp_path_factory.mktemp("changes")
    for name, how in (("whole", {}), ("stopped", {"signal_at": [5, signal.SIGTERM]})):
        args = [*SMALL, f"data.path={dataset}", f"run.dir={folder / name}", "train.steps=10"]
        ranks(TRAIN, 1, args=args, **how)
    return folder


def go_on(ranks: Callable[..., list[Any]], stopped: Path, run: Path, more: list[str]) -> dict[int, float]:
    """The losses of a copy of the stopped run that goes on with a change."""
    shutil.copytree(stopped / "stopped", run)
    ranks(TRAIN, 1, args=[str(run / "config.yaml"), *more])
    return {
        step: metrics["loss/total"] for _, steps in attempts(run / "metrics.jsonl") for step, metrics in steps.items()
    }


@pytest.mark.parametrize("more", [*EXACT, *TO_ROUNDING], ids=lambda more: more[0])
def test_what_may_change_leaves_the_next_losses_as_they_were(
    ranks: Callable[..., list[Any]], stopped: Path, tmp_path: Path, more: list[str]
) -> None:
    [(_, whole)] = attempts(stopped / "whole" / "metrics.jsonl")
    expected = {step: metrics["loss/total"] for step, metrics in whole.items()}
    assert sorted(expected) == list(range(1, 11))
    losses = go_on(ranks, stopped, tmp_path / "run", more)
    assert losses == (expected if more in EXACT else pytest.approx(expected, abs=1e-3))


@pytest.mark.parametrize("change", REFUSED)
def test_what_may_not_change_is_named_and_leaves_the_run_as_it_was(
    ranks: Callable[..., list[Any]], stopped: Path, tmp_path: Path, change: str
) -> None:
    with pytest.raises(RanksFailed, match=change.split("=")[0]):
        go_on(ranks, stopped, tmp_path / "run", [change])
    for name in ("config.yaml", "run.json"):
        assert (tmp_path / "run" / name).read_bytes() == (stopped / "stopped" / name).read_bytes()


@pytest.mark.parametrize("damage", [b"", b"\0" * 4096, b"\xff{}", b"[]", b"[" * 100_000])
def test_a_damaged_line_of_the_journal_keeps_no_run_from_going_on(
    ranks: Callable[..., list[Any]], stopped: Path, tmp_path: Path, damage: bytes
) -> None:
    """It is named in a warning, and what is learned is what it would have been."""
    run = shutil.copytree(stopped / "stopped", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"step": 3,' in line and b"loss/train" in line)
    lines[number] = damage + b"\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    ranks(TRAIN, 1, args=[str(run / "config.yaml")])
    [(_, whole)] = attempts(stopped / "whole" / "metrics.jsonl")
    taken = dict(pair for _, steps in attempts(run / "metrics.jsonl") for pair in steps.items())
    assert sorted(whole.keys() - taken.keys()) == [3]
    assert all(taken[step]["loss/total"] == whole[step]["loss/total"] for step in taken)
    told = [record.fields["text"] for record in read(run / "metrics.jsonl") if record.kind == "warning"]
    assert len([text for text in told if text.startswith(f"metrics.jsonl:{number + 1}: ")]) == 1
    assert [w.fields["text"] for w in run_summary.load(run).warnings if w.kind == "damaged"]
