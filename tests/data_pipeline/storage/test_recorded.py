"""The weights that a dataset was built with hold for its runs, unless they have weights of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.building.api import build
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, go_on, told_shares, wanted_phase
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest
from tests.data_pipeline.conftest import config, prose
from tests.data_pipeline.storage.test_damage import FORMATS
from tests.runs import SMALL, duet

CONTEXT = 16


def settings(folder: Path, **more: Any) -> DataConfig:
    """Much of one source, little of the other, to be read 20 to 80."""
    for number, (name, words) in enumerate({"much": 4000, "little": 500}.items()):
        (folder / f"{name}.txt").write_text(prose(words, seed=number))
    sources = {
        name: {"paths": [str(folder / f"{name}.txt")], "weight": weight}
        for name, weight in {"much": 20.0, "little": 80.0}.items()
    }
    return config(folder / "d", **{"sources": sources, "tokenizer": {"type": "char"}, **more})


def read(dataset: Dataset, **more: Any) -> dict[str, float]:
    """Shares of the first thousand samples of a run that is told where the dataset is."""
    phase = wanted_phase(dataset, DataConfig.model_validate({"path": str(dataset.path), **more}), CONTEXT)
    counts = Plan(dataset, phase, 0).schedule.counts(1000)
    return {name: count / 1000 for name, count in counts.items()}


def test_a_run_reads_as_the_dataset_was_built_to_be_read(tmp_path: Path) -> None:
    build(settings(tmp_path))
    dataset = Dataset.open(tmp_path / "d")
    assert read(dataset) == {"much": 0.2, "little": 0.8}
    assert read(dataset, weights={"much": 1, "little": 1}) == {"much": 0.5, "little": 0.5}
    assert read(dataset, weights={"much": 1}) == {"much": 1, "little": 0}
    own = {name: {"paths": ["x"], "weight": weight} for name, weight in {"much": 3, "little": 1}.items()}
    assert read(dataset, sources=own) == {"much": 0.75, "little": 0.25}


def test_shares_given_apart_and_repeats_are_kept_too(tmp_path: Path) -> None:
    sources = {"much": {"paths": [str(tmp_path / "much.txt")]}, "little": {"paths": [str(tmp_path / "little.txt")]}}
    sources["little"]["repeat"] = 2  # type: ignore[assignment]
    build(settings(tmp_path, sources=sources, weights={"much": 1, "little": 3}, exhausted="drop"))
    dataset = Dataset.open(tmp_path / "d")
    phase = wanted_phase(dataset, DataConfig(path=str(dataset.path)), CONTEXT)
    assert phase.weights == {"much": 1, "little": 3}
    assert phase.caps == {"little": 2 * len(Windows.of(dataset, "train", CONTEXT, source="little"))}


def test_a_build_that_has_nothing_to_do_keeps_new_weights(tmp_path: Path) -> None:
    first = build(settings(tmp_path))
    mine = settings(tmp_path).model_dump()
    for name, weight in {"much": 1.0, "little": 1.0}.items():
        mine["sources"][name]["weight"] = weight
    second = build(DataConfig.model_validate(mine))
    assert second.fingerprint == first.fingerprint
    assert read(Dataset.open(tmp_path / "d")) == {"much": 0.5, "little": 0.5}
    content = (tmp_path / "d" / "manifest.json").read_bytes()
    build(DataConfig.model_validate(mine))
    assert (tmp_path / "d" / "manifest.json").read_bytes() == content


def test_a_run_from_before_weights_were_kept_goes_on_as_it_began(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "format2" / "text", tmp_path / "d")
    old = Dataset.open(tmp_path / "d")
    given = DataConfig(path=str(old.path))
    began = go_on(DataState(fingerprint=old.manifest.fingerprint, seed=0), old, given, CONTEXT)
    assert "by their size" in str(told_shares(old, given, began.phases[-1]))
    saved = began.after(8, 8 * CONTEXT)
    old.manifest.model_copy(update={"format": 4, "weights": {"a": 1.0, "b": 4.0}}).save(old.path)
    new = Dataset.open(tmp_path / "d")
    assert new.manifest.weights == {"a": 1, "b": 4}
    assert go_on(saved, new, given, CONTEXT) == saved
    assert "as this run began" in str(told_shares(new, given, saved.phases[-1]))
    fresh = go_on(DataState(fingerprint=new.manifest.fingerprint, seed=0), new, given, CONTEXT)
    assert fresh.phases[-1].weights == {"a": 1, "b": 4}
    second = go_on(saved, new, given.model_copy(update={"phase": 2}), CONTEXT)
    assert second.phases[-1].weights == {"a": 1, "b": 4}
    with pytest.raises(DataError, match=r"weight of a: .*data\.phase=2"):
        go_on(fresh.after(8, 8), new, DataConfig(path=str(new.path), weights={"a": 1, "b": 1}), CONTEXT)


def test_a_run_says_what_it_reads(tmp_path: Path) -> None:
    built = settings(tmp_path).model_dump(exclude_defaults=True)
    (tmp_path / "data.yaml").write_text(json.dumps({"data": built}))
    done = duet("data", "build", str(tmp_path / "data.yaml"))
    assert done.returncode == 0, done.stderr
    assert "much 20, little 80" in done.stdout
    assert Manifest.load(tmp_path / "d").weights == {"much": 20, "little": 80}
    done = duet("train", *SMALL, f"data.path={tmp_path / 'd'}", f"run.dir={tmp_path / 'run'}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert "much 20.0%, little 80.0%" in done.stdout + done.stderr
