import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import _PREFETCH_GROUPS, Loader, Reader, StepSamples
from data_pipeline.sampling.sample_plan import Plan, wanted_phase
from data_pipeline.sampling.shuffle import SampleOrder
from data_pipeline.sampling.windows import Windows
from data_pipeline.storage.dataset import Dataset


def plan_of(dataset: Dataset, context: int = 32, seed: int = 0, **data: object) -> Plan:
    return Plan(dataset, wanted_phase(dataset, DataConfig.model_validate({"path": "d", **data}), context), seed)


def steps(plan: Plan, count: int, global_batch: int, world_size: int, start: int) -> list[StepSamples]:
    """`count` steps, put together again from all ranks and sorted by position."""
    ranks = []
    for rank in range(world_size):
        reader = Reader(plan, global_batch=global_batch, rank=rank, world_size=world_size, start=start)
        with Loader(reader) as loader:
            ranks.append([next(loader) for _ in range(count)])
    merged = []
    for parts in zip(*ranks, strict=True):
        positions = torch.cat([part.positions for part in parts])
        by_position = torch.argsort(positions)
        merged.append(StepSamples(positions[by_position], torch.cat([p.tokens for p in parts])[by_position], None))
    return merged


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_the_order_is_the_same_on_any_world_size_and_after_any_restart(
    dataset: Dataset, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that changes world size and batch at every restart sees samples 0, 1, 2, ... and nothing else."""
    monkeypatch.setattr("data_pipeline.loading.loader._GROUP_TOKENS", 2**10)  # less is read ahead in vain
    position = data.draw(st.integers(0, 10**12))
    plan, windows = plan_of(dataset), Windows.of(dataset, "train", 32)
    order = SampleOrder(dataset.stream_fingerprint("text"), 0, len(windows))
    for _ in range(3):
        global_batch = data.draw(st.sampled_from([1, 6, 12, 24]))
        world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 6) if global_batch % w == 0]))
        for step in steps(plan, 2, global_batch, world_size, position):
            wanted = np.arange(position, position + global_batch)
            assert step.positions.tolist() == wanted.tolist()
            assert step.tokens.dtype == torch.int64
            assert np.array_equal(step.tokens.numpy(), windows.read(order.windows(wanted)))
            position += global_batch


@pytest.mark.parametrize("order", ["global", "block"])
def test_mixed_sources_come_in_their_shares_whatever_the_ranks(mixed: Dataset, order: str) -> None:
    plan = plan_of(mixed, weights={"large": 3, "small": 1}, order=order)
    whole = steps(plan, 8, 24, 1, 480)
    for world_size in (2, 3, 8):
        for one, many in zip(whole, steps(plan, 8, 24, world_size, 480), strict=True):
            assert torch.equal(one.positions, many.positions)
            assert torch.equal(one.tokens, many.tokens)
    source, window = plan.at(np.arange(480, 480 + 8 * 24))
    assert np.bincount(source).tolist() == [6 * 24, 2 * 24]
    tokens = torch.cat([step.tokens for step in whole]).numpy()
    for number, name in enumerate(("large", "small")):
        rows = source == number
        assert np.array_equal(tokens[rows], Windows.of(mixed, "train", 32, source=name).read(window[rows]))


@pytest.mark.parametrize("planned", [1, 20, 48])
def test_the_order_is_worked_out_in_stretches_that_make_no_difference(
    mixed: Dataset, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(mixed)
    whole = steps(plan, 10, 12, 1, 7)
    monkeypatch.setattr("data_pipeline.loading.loader._PLANNED_SAMPLES", planned)
    monkeypatch.setattr("data_pipeline.loading.loader._GROUP_TOKENS", 12 * 33 * 3)
    for one, other in zip(whole, steps(plan, 10, 12, 3, 7), strict=True):
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.tokens, other.tokens)


def test_no_rank_gets_one_source_only(mixed: Dataset) -> None:
    """Slots of an even mixture alternate: dealt out in turn to two ranks, each would see one source."""
    plan = plan_of(mixed, weights={"large": 1, "small": 1})
    firsts = np.arange(200) * 4
    for rank in range(2):
        source, _ = plan.at(plan.schedule.share(firsts, 4, rank, 2).ravel())
        assert 0.4 < np.mean(source) < 0.6


def test_ranks_that_cannot_share_the_batch_are_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"batch of 10 samples .* by 4 ranks: use 8 or 12 samples, or 2 ranks"):
        Reader(plan_of(dataset), global_batch=10, rank=0, world_size=4)
    with pytest.raises(DataError, match="use 4 samples, or 3 ranks"):
        Reader(plan_of(dataset), global_batch=3, rank=0, world_size=4)


def test_close_ends_the_thread_at_once(dataset: Dataset) -> None:
    before = threading.enumerate()
    loader = Loader(Reader(plan_of(dataset), global_batch=4, rank=0, world_size=1))
    next(loader)
    [thread] = [thread for thread in threading.enumerate() if thread not in before]
    assert thread.name == "data-prefetch"
    loader.close()
    assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_errors_of_the_thread_reach_the_consumer(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    for shard in dataset.manifest.shards:
        Path(dataset.path / shard.path).unlink()
    loader = Loader(Reader(plan, global_batch=4, rank=0, world_size=1))
    with pytest.raises(DataError, match="is missing"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_the_last_step_before_the_end_of_the_data_is_read(mixed: Dataset) -> None:
    sources = {name: {"paths": ["x"], "repeat": 0.5} for name in ("large", "middle", "small")}
    plan = plan_of(mixed, sources=sources, weights={"small": 1})
    cap = len(Windows.of(mixed, "train", 32, source="small")) // 2
    with Loader(Reader(plan, global_batch=5, rank=0, world_size=1)) as loader:
        seen = [next(loader).positions.tolist() for _ in range(cap // 5)]
        with pytest.raises(DataError, match=rf"the data end at sample {cap} of the run .*: small {cap}\. Train fewer"):
            next(loader)
    assert [position for step in seen for position in step] == list(range(cap // 5 * 5))
    with pytest.raises(DataError, match="the data end"):
        plan.schedule.check(cap + 1)
    plan.schedule.check(cap)


def test_document_starts_are_those_of_the_rows(mixed: Dataset) -> None:
    """Against the bounds of the documents themselves, over all edges of batches and shards."""
    from data_pipeline.inspection.statistics import documents

    for context in (7, 64, 1000):
        windows = Windows.of(mixed, "train", context)
        lengths = [sum(map(len, rows)) for rows in documents(mixed, "train")]
        begins = np.zeros(sum(lengths) + 1, bool)
        begins[np.cumsum([0, *lengths])] = True
        order = np.random.default_rng(0).permutation(len(windows))
        batches, offsets = windows.places(order)
        found = windows.document_starts(batches.tolist(), offsets.tolist(), range(len(order)))
        marks = np.zeros(len(order) * (context + 1), bool)
        marks[found] = True
        wanted = np.stack([begins[i * context : i * context + context + 1] for i in order])
        wanted[:, 0] = False
        assert np.array_equal(marks.reshape(wanted.shape), wanted)
        assert wanted.any()


def test_steps_tell_where_documents_begin(mixed: Dataset) -> None:
    plan = plan_of(mixed)
    reader = Reader(plan, global_batch=12, rank=1, world_size=2, documents=True)
    for _, step in zip(range(5), reader, strict=False):
        assert step.document_starts is not None
        assert (np.diff(step.document_starts) > 0).all()
        source, window = plan.at(step.positions.numpy())
        rows = step.document_starts // 33
        for row, (k, index) in enumerate(zip(source.tolist(), window.tolist(), strict=True)):
            windows = list(plan.windows.values())[k]
            places = [place.tolist() for place in windows.places(np.array([index]))]
            assert windows.document_starts(*places, [row]).tolist() == step.document_starts[rows == row].tolist()


def test_waiting_ends_with_the_data_or_when_it_is_given_up() -> None:
    stalled = threading.Event()

    def groups() -> Iterator[list[StepSamples]]:
        for position in range(2):
            yield [StepSamples(torch.tensor([position]), torch.zeros(1, 33, dtype=torch.int64), None)]
            stalled.wait(60)

    asked = 0

    def give_up() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with Loader(cast(Reader, SimpleNamespace(groups=groups))) as loader:
        loader.wait(lambda: False)
        assert next(loader).positions.tolist() == [0]
        loader.wait(give_up)
        assert asked == 4, "looked again and again"
        stalled.set()
        loader.wait(lambda: False)
        loader.wait(lambda: pytest.fail("there is a step"))
        assert next(loader).positions.tolist() == [1]


def test_the_thread_reads_a_bounded_number_of_groups_ahead_and_frees_them() -> None:
    made: list[int] = []
    freed: list[str] = []
    taken = 0

    def groups() -> Iterator[list[StepSamples]]:
        for group in itertools.count():
            made.append(group - taken // 3)
            positions = torch.arange(3 * group, 3 * group + 3)
            tokens = torch.zeros(3, 33, dtype=torch.int64)
            weakref.finalize(tokens.untyped_storage(), lambda: freed.append(threading.current_thread().name))
            yield [StepSamples(*step, None) for step in zip(positions.split(1), tokens.split(1), strict=True)]

    with Loader(cast(Reader, SimpleNamespace(groups=groups))) as loader:
        while taken < 300:
            assert next(loader).positions.tolist() == [taken]
            taken += 1
        while len(made) < 100 + _PREFETCH_GROUPS:
            time.sleep(0.001)
        assert max(made) <= _PREFETCH_GROUPS
        loader.close()
        assert len(made) == 100 + _PREFETCH_GROUPS
        assert freed == ["data-prefetch"] * (100 - 1), "all but the one that was read last"
