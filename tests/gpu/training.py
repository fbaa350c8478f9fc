"""The trainer as it is: no waiting for the device, the CPU's losses, and resuming after a kill, bit for bit."""

import contextlib
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import trainer
from pretrain.config.schema import load
from pretrain.engine.distributed import Ranks, join
from pretrain.report import report
from pretrain.run import journal
from pretrain.run.job_records import FailureFile
from pretrain.run.signals import StopRequest
from tests.gpu.setting import ROOT, Row, Setting, each
from tests.runs import SMALL, check_resumed, kill, newest_on_disk, wait_for_step

STEPS = 60
WATCHED = range(4, 9)
"""Steps in which nobody may wait: the first ones allocate, and nothing is logged, saved or validated in these."""
CAUGHT = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
"""What waits for a GPU, and can be seen on a CPU."""
HOSTS = str(ROOT / "pretrain" / "engine" / "distributed.py")
"""What ranks agree on are tensors of the host, on a GPU, too: a CPU cannot tell these from others."""
OURS = tuple(str(ROOT / package) for package in ("data_pipeline", "launch", "model", "pretrain"))


def together(setting: Setting) -> Iterator[Row]:
    """The trainer in this process, at each stage; then a run that traces, validates and writes, beside the CPU's."""
    report.write = lambda runs, out: None
    data = dataset(setting)
    beside = start(setting, data, "on-cpu", *_TOLD, CUDA_VISIBLE_DEVICES="")
    with join(timeout_minutes=2) as ranks:
        stages = {f"ZeRO {stage}": partial(_unwatched, setting, data, ranks, stage) for stage in range(4)}
        yield from each(stages | {"training": partial(_beside, setting, data, ranks, beside)})


def words(setting: Setting, data: Path, name: str, *more: str) -> list[str]:
    where = [f"data.path={data}", f"run.dir={setting.folder / name}", f"train.steps={STEPS}"]
    return [*SMALL, *where, f"train.eval_every={STEPS}", "train.checkpoint_every=20", *more]


def dataset(setting: Setting) -> Path:
    """Of the licence's text, by characters; made once."""
    path = setting.folder / "data"
    if not path.exists():
        build = [
            "-P",
            "-m",
            "launch.cli",
            "data",
            "build",
            "data/characters",
            f"data.sources.text.paths=[{ROOT / 'LICENSE'}]",
        ]
        subprocess.run([sys.executable, *build, f"data.path={path}"], check=True, env=_environment(), stdout=sys.stderr)
    return path


def start(setting: Setting, data: Path, name: str, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    """A rank in a process of its own."""
    with open(setting.folder / f"{name}.log", "ab") as log:
        command = [sys.executable, "-P", "-c", _UNDRAWN, *words(setting, data, name, *more)]
        return subprocess.Popen(command, env=_environment() | environment, stdout=log, stderr=log)


_UNDRAWN = """import runpy
from pretrain.report import report
report.write = lambda runs, out: None
runpy.run_module("pretrain", run_name="__main__")"""
"""`python -m pretrain`, but for the pictures at its end, which are no matter of a GPU."""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _train(config_words: list[str], ranks: Ranks) -> None:
    request = trainer.train(load(config_words), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
    assert not request, f"stopped by signal {request}"


def _unwatched(setting: Setting, data: Path, ranks: Ranks, stage: int) -> Iterator[Row]:
    """Between the end of one step and that of a later one: forward, backward, update, data, agreement on signals."""
    waits, take = Waits(setting.device), trainer.Loop._take_step

    def watched(loop: trainer.Loop) -> None:
        take(loop)
        if loop.step == WATCHED.start - 1:
            waits.__enter__()
        if loop.step == WATCHED.stop - 1:
            waits.__exit__(None, None, None)

    trainer.Loop._take_step = watched  # type: ignore[method-assign,assignment]
    try:
        more = (f"engine.zero_stage={stage}", "train.steps=12", "train.log_every=100", "train.checkpoint_every=100")
        _train(words(setting, data, f"watched-{stage}", *more), ranks)
    finally:
        trainer.Loop._take_step = take  # type: ignore[method-assign]
    ours = {place: count for place, count in waits.places.items() if place.startswith(OURS)}
    theirs = {place: count for place, count in waits.places.items() if place not in ours}
    steps = len(WATCHED)
    own_limit = 1.0 if stage == 0 else 0.0  # the check of the norm, which DeepSpeed leaves to us there
    yield Row(f"ZeRO {stage}: waits of ours, a step", sum(ours.values()) / steps, own_limit, note=_brief(ours))
    yield Row(f"ZeRO {stage}: waits of DeepSpeed's, a step", sum(theirs.values()) / steps, note=_brief(theirs))


def _brief(places: dict[str, int]) -> str:
    return "; ".join(f"{count} x {place.removeprefix(str(ROOT) + '/')}" for place, count in places.items())[-300:]


class Waits:
    """Where the host waited for the device, as a context: CUDA tells; on a CPU the operations that would wait count."""

    def __init__(self, device: str) -> None:
        self.places: Counter[str] = Counter()
        self._cuda = device == "cuda"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Waits":
        if self._cuda:
            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            self._stack.enter_context(_Waiting(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _warned(self, message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            self._note()

    def _note(self) -> None:
        """The innermost line that is ours or DeepSpeed's."""
        for frame in reversed(traceback.extract_stack()):
            if frame.filename == HOSTS and not self._cuda:
                return
            if frame.filename.startswith(OURS) or "/deepspeed/" in frame.filename:
                self.places[f"{frame.filename}:{frame.lineno}"] += 1
                return
        self.places["elsewhere"] += 1


class _Waiting(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CAUGHT:
            self._note()
        return func(*args, **(kwargs or {}))


_TOLD = ("train.sample_tokens=12", "train.steps=40", "train.eval_every=20", "optimizer.lr=0.003")
APART = 0.01
"""Of a step's loss, at most: rounding alone moves 40 steps of this model apart by less than a thousandth."""


def _beside(setting: Setting, data: Path, ranks: Ranks, other: subprocess.Popen[bytes]) -> Iterator[Row]:
    _train(words(setting, data, "traced", *_TOLD, "profile.steps=[3,5]"), ranks)
    code = other.wait(120)
    assert code == 0, (setting.folder / "on-cpu.log").read_text()[-2000:]
    ours, theirs = (_losses(setting.folder / name / "metrics.jsonl") for name in ("traced", "on-cpu"))
    assert ours.keys() == theirs.keys(), f"steps {sorted(ours.keys() ^ theirs.keys())} are missing"
    yield Row("loss of 40 steps beside the CPU's", max(abs(ours[n] / theirs[n] - 1) for n in ours), APART)
    written = [file.name for file in (setting.folder / "traced" / "profile").iterdir()]
    expected = 1 if setting.tiny else 2
    yield Row("files of the profiler", len(written), expected, at_least=True, note=", ".join(written))
    samples = sum(record.kind == "sample" for record in journal.read(setting.folder / "traced" / "metrics.jsonl"))
    yield Row("samples written in training", samples, 2, at_least=True)


def _losses(path: Path) -> dict[int, float]:
    records = (record for record in journal.read(path) if record.kind == "metrics")
    return {record.step or 0: record.metrics["loss/train"] for record in records if "loss/train" in record.metrics}


def resumed(setting: Setting) -> Iterator[Row]:
    """Each stage: a run that nothing stops, and one that is killed without warning and started again, at once."""
    data = dataset(setting)
    stages = (1, 3) if setting.tiny else range(4)
    with ThreadPoolExecutor(len(stages)) as pool:
        found = {f"ZeRO {stage}": pool.submit(_killed, setting, data, stage) for stage in stages}
        yield from each({name: partial(_attempts, name, of.result) for name, of in found.items()})


def _attempts(name: str, found: Callable[[], int]) -> Iterator[Row]:
    yield Row(f"{name}: attempts that agree bit for bit with the run that nothing stopped", found(), 2, at_least=True)


def _killed(setting: Setting, data: Path, stage: int) -> int:
    more = (f"engine.zero_stage={stage}", "train.checkpoint_every=10")
    names = whole, broken = f"whole-{stage}", f"broken-{stage}"
    reference, victim = (start(setting, data, name, *more) for name in names)
    try:
        folder = setting.folder / broken
        wait_for_step(folder / "metrics.jsonl", 25, victim)
        kill(victim)
        newest = newest_on_disk(folder)
        victim = start(setting, data, broken, *more)
        codes = {name: process.wait(100) for name, process in zip(names, (reference, victim), strict=True)}
        assert not any(codes.values()), f"exit codes {codes}\n" + (setting.folder / f"{broken}.log").read_text()[-2000:]
    finally:
        for process in (reference, victim):
            process.kill()
    return check_resumed(folder / "metrics.jsonl", setting.folder / whole / "metrics.jsonl", 10, [newest])
