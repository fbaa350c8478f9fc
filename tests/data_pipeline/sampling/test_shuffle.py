import time

import numpy as np
import pytest

from data_pipeline.sampling.shuffle import SampleOrder


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_epoch_visits_each_window_once(epoch: int) -> None:
    for n in [*range(1, 4097, 1 if epoch == 0 else 61), 4097, 65_537, 99_991]:
        windows = SampleOrder("f", 1, n).windows(np.arange(epoch * n, (epoch + 1) * n))
        assert np.array_equal(np.sort(windows), np.arange(n)), n


def test_the_order_of_earlier_runs_stands() -> None:
    """They go on from a position, so what comes there must never change."""
    late = SampleOrder("f", 1, 1_000_003).windows(np.arange(10**9, 10**9 + 6))
    assert late.tolist() == [718506, 799762, 176507, 224715, 160740, 943469]
    first = SampleOrder("f" * 64, 1337, 7).windows(np.arange(14))
    assert first.tolist() == [5, 6, 1, 3, 0, 4, 2, 0, 5, 2, 1, 4, 3, 6]


@pytest.mark.parametrize("n", [1, 2, 5, 17, 100, 1001])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 16, 50, 2000])
def test_blocks_are_read_one_after_the_other_and_whole(n: int, block: int) -> None:
    order = SampleOrder("f", 1, n, block)
    visits = order.windows(np.arange(3 * n)).reshape(3, n)
    for epoch in visits:
        assert np.array_equal(np.sort(epoch), np.arange(n))
        blocks = epoch // block
        assert np.count_nonzero(np.diff(blocks)) == len(set(blocks.tolist())) - 1
    some = np.random.default_rng(0).integers(0, 3 * n, 60)
    assert visits.ravel()[some].tolist() == [int(order.windows(np.array([p]))[0]) for p in some]
    if n > 100 and block <= 50:
        assert not np.array_equal(visits[0], visits[1])


def test_blocks_look_random_inside_and_out() -> None:
    n, block = 300_000, 4096
    visits = SampleOrder("f", 1, n, block).windows(np.arange(n))
    assert abs(np.corrcoef(visits[:-1] % block, visits[1:] % block)[0, 1]) < 0.02
    firsts = (visits // block)[np.flatnonzero(np.diff(visits // block)) + 1]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.3  # 73 blocks
    within = visits[visits < block], visits[(visits >= block) & (visits < 2 * block)] - block
    assert np.mean(within[0] == within[1]) < 0.01


def test_order_depends_on_fingerprint_seed_and_epoch_only() -> None:
    n, positions = 1000, np.arange(1000)
    first = SampleOrder("f", 1, n).windows(positions)
    assert np.array_equal(first, SampleOrder("f", 1, n).windows(positions))
    others = [SampleOrder("g", 1, n).windows(positions), SampleOrder("f", 2, n).windows(positions)]
    others.append(SampleOrder("f", 1, n).windows(positions + n))
    for other in others:
        assert np.mean(first == other) < 0.02


def test_a_batch_may_span_epochs_and_come_in_any_order() -> None:
    order = SampleOrder("f", 1, 7)
    positions = np.random.default_rng(0).integers(0, 100, 50)
    assert order.windows(positions).tolist() == [int(order.windows(np.array([p]))[0]) for p in positions]


@pytest.mark.parametrize("n", [300_000, 1_000_003, 1 << 20])
def test_order_looks_random(n: int) -> None:
    windows = SampleOrder("fingerprint", 7, n).windows(np.arange(n))
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.02
    # Where 512 neighbours in the order come from, over 64 equal parts of the data.
    groups = windows[: n // 512 * 512].reshape(-1, 512) * 64 // n
    counts = np.stack([np.bincount(group, minlength=64) for group in groups])
    assert np.mean(np.sum((counts - 8) ** 2 / 8, axis=1) / 63) < 1.2
    steps = np.diff(windows) % n * 64 // n
    expected = (n - 1) / 64
    assert np.sum((np.bincount(steps, minlength=64) - expected) ** 2 / expected) / 63 < 1.8


def test_a_late_start_costs_what_an_early_one_does() -> None:
    order = SampleOrder("f", 1, 488_281_250)

    def seconds(start: int) -> float:
        began = time.process_time()
        order.windows(np.arange(start, start + 20_000))
        return time.process_time() - began

    early, late = zip(*((seconds(0), seconds(10**11)) for _ in range(9)), strict=True)
    assert min(late) < 2 * min(early) + 1e-3


@pytest.mark.parametrize("arguments", [(0,), (5, 0)])
def test_no_windows_is_an_error(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        SampleOrder("f", 1, *arguments)
