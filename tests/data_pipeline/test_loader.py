import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import DataState, Loader, StepSamples
from data_pipeline.order import SampleOrder


def order_of(dataset: Dataset, context: int) -> SampleOrder:
    return SampleOrder(dataset.manifest.fingerprint, 0, len(dataset.windows("train", context)))


def steps(dataset: Dataset, count: int, global_batch: int, world_size: int, start: int) -> list[StepSamples]:
    """`count` steps, put together again from all ranks and sorted by position."""
    windows = dataset.windows("train", 32)
    ranks = []
    for rank in range(world_size):
        with Loader(
            windows,
            order_of(dataset, 32),
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            start=start,
        ) as loader:
            ranks.append([next(loader) for _ in range(count)])
    merged = []
    for parts in zip(*ranks, strict=True):
        positions = torch.cat([part.positions for part in parts])
        by_position = torch.argsort(positions)
        merged.append(StepSamples(positions[by_position], torch.cat([part.tokens for part in parts])[by_position]))
    return merged


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_is_the_same_on_any_world_size_and_after_any_restart(dataset: Dataset, data: st.DataObject) -> None:
    """A run that changes world size and batch at every restart sees samples 0, 1, 2, ... and nothing else."""
    position = data.draw(st.integers(0, 10**12))
    windows, order = dataset.windows("train", 32), order_of(dataset, 32)
    for _ in range(3):
        global_batch = data.draw(st.sampled_from([1, 6, 12, 24]))
        world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 6) if global_batch % w == 0]))
        for step in steps(dataset, 2, global_batch, world_size, position):
            wanted = np.arange(position, position + global_batch)
            assert step.positions.tolist() == wanted.tolist()
            assert step.tokens.dtype == torch.int64
            assert np.array_equal(step.tokens.numpy(), windows.read(order.windows(wanted)))
            position += global_batch


def test_ranks_that_cannot_share_the_batch_are_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"batch of 10 samples .* by 4 ranks: use 8 or 12 samples, or 2 ranks"):
        Loader(dataset.windows("train", 32), order_of(dataset, 32), global_batch=10, rank=0, world_size=4)
    with pytest.raises(DataError, match="use 4 samples, or 3 ranks"):
        Loader(dataset.windows("train", 32), order_of(dataset, 32), global_batch=3, rank=0, world_size=4)
    with pytest.raises(ValueError, match="windows"):
        Loader(dataset.windows("train", 64), order_of(dataset, 32), global_batch=4, rank=0, world_size=4)


def test_close_ends_the_thread_at_once(dataset: Dataset) -> None:
    loader = Loader(dataset.windows("train", 32), order_of(dataset, 32), global_batch=4, rank=0, world_size=1)
    next(loader)
    assert any(thread.name == "data-prefetch" for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name == "data-prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_errors_of_the_thread_reach_the_consumer(dataset: Dataset) -> None:
    windows = dataset.windows("train", 32)
    for shard in dataset.manifest.shards:
        Path(dataset.path / shard.path).unlink()
    loader = Loader(windows, order_of(dataset, 32), global_batch=4, rank=0, world_size=1)
    with pytest.raises(DataError, match="is missing"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_state_advances_and_knows_its_dataset() -> None:
    state = DataState(fingerprint="a", seed=1).after(8, 512).after(8, 512)
    assert (state.samples_seen, state.tokens_seen) == (16, 1024)
    assert DataState.model_validate_json(state.model_dump_json()) == state
    state.check("a")
    with pytest.raises(DataError, match="the dataset changed"):
        state.check("b")
