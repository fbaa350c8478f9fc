import time

import numpy as np
import pytest

from data_pipeline.order import SampleOrder


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_epoch_visits_each_window_once(epoch: int) -> None:
    for n in [*range(1, 1025), 4095, 4097, 65_537, 99_991]:
        windows = SampleOrder("f", 1, n).windows(np.arange(epoch * n, (epoch + 1) * n))
        assert np.array_equal(np.sort(windows), np.arange(n)), n


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
        times = []
        for _ in range(9):
            began = time.process_time()
            order.windows(np.arange(start, start + 20_000))
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(10**11) < 2 * seconds(0) + 1e-3


def test_no_windows_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        SampleOrder("f", 1, 0)
