"""What the commands that look at a dataset say."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.inspection.locate import locate
from data_pipeline.inspection.statistics import documents
from data_pipeline.sampling.mixture import Mixture
from data_pipeline.sampling.sample_plan import Plan, wanted_phase
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset
from launch.commands.data_plan import locate_lines, plan_lines
from pretrain.config.schema import load
from tests.data_pipeline.inspection.test_commands import duet_data


def test_samples_are_traced_to_the_very_documents(mixed: Dataset) -> None:
    plan = Plan(mixed, wanted_phase(mixed, DataConfig(path="d"), 200), 0)
    texts = {name: [np.concatenate(rows) for rows in documents(mixed, "train", name)] for name in plan.windows}
    positions = np.arange(40)
    sources, indices = plan.at(positions)
    for source, index, passage in zip(sources, indices, locate(plan, positions), strict=True):
        assert (passage.source, passage.window) == (list(plan.windows)[source], index)
        window = plan.windows[passage.source].read(np.array([index]))[0, :-1]
        assert np.array_equal(np.concatenate([part for _, part in passage.origin.documents]), window)
        numbers = [number for number, _ in passage.origin.documents]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        ends = np.cumsum([0, *map(len, texts[passage.source])])
        begin = index * 200
        for number, part in passage.origin.documents:
            at = begin - ends[number]
            assert np.array_equal(texts[passage.source][number][at : at + len(part)], part)
            begin += len(part)
        facts = next(facts for facts in mixed.manifest.shards if facts.path == passage.origin.shard)
        tokens = np.concatenate([mixed.shard(facts).tokens(b) for b in range(facts.batches)])
        length = min(200, len(tokens) - passage.origin.offset)
        assert np.array_equal(tokens[passage.origin.offset : passage.origin.offset + length], window[:length])


def test_locate_says_what_a_step_reads(mixed: Dataset) -> None:
    args = [f"data.path={mixed.path}", "model.context=64", "batch.tokens=512"]
    lines = list(locate_lines(args, None, 3, text=True))
    assert lines[0] == "step 3: samples 16 to 23, windows of 64 tokens"
    assert sum(line.startswith("sample ") for line in lines) == 8
    assert any("train/" in line and "documents " in line for line in lines)
    assert "sample 16" in duet_data("locate", *args, "--step", "3")
    with pytest.raises(DataError, match="either a run with --run"):
        next(locate_lines([], None, 1, text=False))
    with pytest.raises(DataError, match="either a run with --run"):
        next(locate_lines(args, Path("runs/x"), 1, text=False))


def test_a_plan_says_how_often_each_source_is_read(mixed: Dataset) -> None:
    args = [f"data.path={mixed.path}", "model.context=64", "batch.tokens=512", "data.weights={large: 3, small: 1}"]
    planned = duet_data("plan", *args, "--tokens", "64K").splitlines()
    assert planned[0] == "64,000 tokens: 1,000 samples of 64, 125 steps"
    small = len(Windows.of(mixed, "train", 64, source="small"))
    assert f"{250 / small:.2f} epochs" in next(line for line in planned if line.startswith("small"))
    assert any(line.startswith("middle") and line.endswith("not read") for line in planned)
    repeat = [*args, "data.sources.small.paths=[x]", "data.sources.small.repeat=1"]
    ended = list(plan_lines(load(repeat), 64_000))
    end = Mixture([3, 1]).slot_of(1, small)
    assert f"the data end {64_000 - end * 64:,} tokens early, at sample {end:,} " in ended[-1]
    dropped = list(plan_lines(load([*repeat, "data.exhausted=drop"]), 64_000))
    assert dropped[-1] == f"from sample {end:,} (step {end // 8 + 1:,}) without small"
    assert f"{small * 64:,} tokens read        1.00 epochs, at most 1.00" in "".join(dropped)


def test_inspecting_shows_every_source(mixed: Dataset) -> None:
    shown = duet_data("inspect", str(mixed.path), "--samples", "1")
    for name, facts in mixed.sources().items():
        assert f"{name}: train document 0, " in shown
        assert f"{facts.tokens['train']} tokens train" in shown


def test_the_documents_of_the_sources_are_those_of_the_split(mixed: Dataset) -> None:
    whole = [np.concatenate(rows).tolist() for rows in documents(mixed, "train")]
    parts = [documents(mixed, "train", source.name) for source in mixed.manifest.sources]
    assert whole == [np.concatenate(rows).tolist() for rows in itertools.chain(*parts)]
