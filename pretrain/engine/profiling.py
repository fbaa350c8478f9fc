"""Where the time of a step goes: a stopwatch that runs always, and torch's profiler for the steps one asks for."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MAX_MEMORY_EVENTS = 1_000_000


class Stopwatch:
    """Times the parts of a step. On CUDA by events in the stream, so that neither `start` nor `lap` waits for it.

    There, a part lasts from the end of the work queued before it to the end of its own, so a device that is idle
    because its host is late is seen, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []
        self._spare: list[Any] = []

    def start(self) -> None:
        """A step begins; the time since the last lap belongs to no part."""
        self._mark(None)

    def lap(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        self._mark(part)

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; on CUDA this waits for the device."""
        seconds: dict[str, float] = defaultdict(float)
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        for (_, before), (part, now) in pairwise(self._marks):
            if part is not None:
                seconds[part] += before.elapsed_time(now) / 1e3 if self._cuda else now - before
        if self._cuda:
            self._spare += [event for _, event in self._marks]
        self._marks.clear()
        return seconds

    def _mark(self, part: str | None) -> None:
        if self._cuda:
            mark = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))


class Profile:
    """Traces the steps from the first to the last one asked for, on rank 0; as a context, it ends what is open.

    Writes `trace-STEP.json.gz`, a Chrome trace (chrome://tracing, ui.perfetto.dev), and on CUDA
    `memory-STEP.pickle` (pytorch.org/memory_viz); STEP is the first one traced.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        device: torch.device,
        written: Callable[[int, Path], None],
    ) -> None:
        """`steps` is None where nothing is to be traced; `written` hears of each file and its step."""
        self._steps = steps
        self._folder = folder
        self._cuda = device.type == "cuda"
        self._written = written
        self._profiler: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        """A step begins."""
        if self._steps and self._profiler is None and self._steps[0] <= step <= self._steps[1]:
            self._first = step
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._cuda else [])
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after(self, step: int) -> None:
        """A step is done."""
        if self._steps and self._profiler is not None:
            if step < self._steps[1]:
                self._profiler.step()  # a mark in the trace
            else:
                self._end()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:  # stopped before the last step asked for
            self._end()

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._write(f"trace-{self._first}.json.gz", profiler.export_chrome_trace)
        if self._cuda:
            self._write(f"memory-{self._first}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, export: Callable[[str], None]) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / name
        partial = path.with_name(f".{name}")  # the ending stays: torch compresses by it
        export(str(partial))
        os.replace(partial, path)
        self._written(self._first, path)
