"""Seconds of what a device does, and of a CPU in a rehearsal."""

import statistics
import time
from collections.abc import Callable

import torch

from tests.gpu.setting import Setting

SECONDS = 3.0
"""For which a step is timed."""


def seconds(work: Callable[[], object], setting: Setting) -> float:
    """Mean of a call among many that follow each other without a wait, after three that are not counted."""
    for _ in range(3):
        work()
    since = now(setting)
    work()
    once = now(setting) - since
    number = 2 if setting.tiny else max(3, min(100, int(SECONDS / once)))
    since = now(setting)
    for _ in range(number):
        work()
    return (now(setting) - since) / number


def medians(works: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    turns = 2 if setting.tiny else 15
    for turn in range(-3, turns):
        for name, work in works.items():
            since = now(setting)
            work()
            if turn >= 0:
                taken[name].append(now(setting) - since)
            else:
                now(setting)
    return {name: statistics.median(times) for name, times in taken.items()}


def now(setting: Setting) -> float:
    """Seconds, when the device has done all that was asked of it."""
    if not setting.tiny:
        torch.cuda.synchronize()
    return time.perf_counter()
