"""Runs that are asked to stop, or fail, at an awkward moment; started through the fixture `ranks`."""

import errno
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_pipeline.errors import ConfigError, DataError, RunError
from data_pipeline.loading import loader
from launch.slurm.run_files import read_files
from launch.slurm.run_status import join
from model.architectures import registry
from pretrain import life, trainer
from pretrain.checkpoint.saver import Saver
from pretrain.config.schema import load
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.evaluation.batches import Batches
from pretrain.report import report
from pretrain.run.checkpoint_folder import needed_by
from pretrain.run.job_records import FailureFile, JobFolder
from pretrain.run.signals import StopRequest
from pretrain.tracking import recorder
from tests.distributed.cases import train_run, without_report


def run(ranks: Ranks, args: list[str], job: str | None = None, restart: int = 0, lead: float = 0) -> int:
    """A whole run, in a job of Slurm if one is named; validations in small batches. Returns why it ended early."""
    if job:
        os.environ |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart), "SLURMD_NODENAME": f"n{ranks.rank}"}
        os.environ |= {"RUN_DIR": str(load(args).run_dir), "DUET_STOP_LEAD": str(lead)}
    evaluate = trainer.evaluate
    trainer.evaluate = lambda module, windows, size, batch, *more, **part: evaluate(
        module, windows, size, 4, *more, **part
    )
    without_report()
    return trainer.train(load(args), ranks, StopRequest(), time.time(), FailureFile(ranks.rank))


def with_sources(ranks: Ranks, args: list[str], sources: list[str]) -> int | str:
    """A run in which each rank reads a file of its own; why it ended, or the user's mistake."""
    without_report()
    config = load([*args, f"model.architecture={sources[ranks.rank]}:GLA"])
    try:
        return trainer.train(config, ranks, StopRequest(), time.time(), FailureFile(ranks.rank))
    except ConfigError as error:
        return str(error)


def signalled_in_validation(ranks: Ranks, args: list[str], at: int) -> list[int]:
    """Rank 1 alone gets the planned signal in the batch number `at` of the first validation. Returns batches, too."""
    batches, of_validation = [0], Batches.of_validation

    def count(*given: Any) -> Any:
        batches[0] += 1
        if ranks.rank == 1 and batches[0] == at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return of_validation(*given)

    Batches.of_validation = count  # type: ignore[assignment,method-assign]
    return [run(ranks, args, job="7"), batches[0]]


def watched_in_validation(ranks: Ranks, args: list[str]) -> list[Any]:
    """What a look into the folder finds in the fifth batch of the first validation, when the disk has the step."""
    batches, of_validation, seen = [0], Batches.of_validation, list[Any]()
    saving, start = list[Saver](), Saver.start
    run_dir = load(args).run_dir

    def look(*given: Any) -> Any:
        batches[0] += 1
        if batches[0] in (2, 3, 4):
            while saving[-1].writing:
                time.sleep(0.001)
        if batches[0] == 5 and ranks.is_first:
            seen.extend([read_files(run_dir).checkpoint, join(read_files(run_dir), [], asked=False).state])
        return of_validation(*given)

    def remember(self: Saver, *given: Any) -> None:
        saving.append(self)
        start(self, *given)

    Batches.of_validation, Saver.start = look, remember  # type: ignore[assignment,method-assign]
    assert run(ranks, args) == 0
    return [*seen, batches[0]]


def signalled_while_data_stall(ranks: Ranks, args: list[str], step: int) -> int:
    """Rank 1's data of a step never come; it alone gets the planned signal, once it waits for them."""
    loader._GROUP_TOKENS, loader._JOIN_SECONDS = 1, 0.1
    read, wait, count = loader.Reader._read, loader.Loader.wait, [0]
    waiting: list[loader.Loader] = []

    def stall(*given: Any) -> Any:
        count[0] += 1
        if ranks.rank == 1 and count[0] == step:
            while not waiting or waiting[0]._unread or not waiting[0]._ready.empty():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait()
        return read(*given)

    def remember(self: loader.Loader, give_up: Any) -> None:
        waiting.append(self)
        wait(self, give_up)
        waiting.clear()

    loader.Reader._read = stall  # type: ignore[assignment,method-assign]
    loader.Loader.wait = remember  # type: ignore[method-assign]
    return run(ranks, args, job="7")


def stopped_behind_its_start(ranks: Ranks, run_dir: str) -> int:
    """From step 10 to 11, back to 6, on to 7, and the planned signal. Returns the steps that the wish tells of."""
    os.environ["SLURM_JOB_ID"] = "7"
    recording: Any = SimpleNamespace(attempt=1)
    ours = life.Life(Path(run_dir), ranks, StopRequest(), None, recording)
    ours.begin(10)
    for step in (11, 7):
        ours.after_step(step, [])
    ours.ended(7, signal.SIGUSR1)
    wish = JobFolder(Path(run_dir)).requeue_wish()
    assert wish
    return wish.trained


def failing(ranks: Ranks, args: list[str], step: int, mistake: bool) -> None:
    """Rank 1 fails in a step."""
    train_step, now = Engine.train_step, [0]

    def fail(*given: Any) -> Any:
        now[0] += 1
        if now[0] == step and ranks.rank == 1:
            raise DataError("the shard is damaged") if mistake else ValueError("a bug")
        return train_step(*given)

    Engine.train_step = fail  # type: ignore[method-assign,assignment]
    run(ranks, args, job="7", restart=3)


def reporting(ranks: Ranks, args: list[str], what: str, at_end: bool) -> list[int | None]:
    """A run to its end, or to Ctrl-C in step 4, whose report fails or is interrupted. The request, the exit code."""
    train_step, now, stop = Engine.train_step, [0], StopRequest()

    def write(runs: Any, out: Path) -> None:
        if what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what])
            threading.Event().wait(60)
        raise OSError(errno.ENOSPC, "the disk is full") if what == "disk" else MemoryError(what)

    def interrupt(*given: Any) -> Any:
        now[0] += 1
        if now[0] == 4 and not at_end:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*given)

    def load_data(path: Path) -> Any:
        raise RunError("a damaged line")

    Engine.train_step = interrupt  # type: ignore[method-assign,assignment]
    report.write = write
    if what == "journal":
        recorder.load = load_data  # type: ignore[assignment]
    request = trainer.train(load(args), ranks, stop, time.time(), FailureFile(ranks.rank))
    return [request, stop.code]


def sampling(ranks: Ranks, args: list[str]) -> int:
    """The sample of rank 0 fails in the validation after the last step."""

    def fail(*given: Any) -> str:
        raise MemoryError("no room for a cache")

    trainer.sample_text = fail  # type: ignore[assignment]
    return run(ranks, args)


def waiting(ranks: Ranks, seconds: float, dies: bool) -> list[float]:
    """Rank 0 comes late, or is gone. How long this rank waited for it, and for how long it was at work meanwhile."""
    since, work = time.monotonic(), time.process_time()
    if ranks.is_first:
        time.sleep(seconds)
    if not (ranks.is_first and dies):
        ranks.part()
    return [time.monotonic() - since, time.process_time() - work]


def switched_off(ranks: Ranks, args: list[str], step: int) -> int:
    """Somebody touches the kill switch during a step; the lead time is too short for anything."""
    train_step, now = Engine.train_step, [0]

    def touch(*given: Any) -> Any:
        now[0] += 1
        if now[0] == step and ranks.rank == 1:
            switch = load(args).run_dir / "slurm" / "stop"
            switch.parent.mkdir()
            switch.touch()
        return train_step(*given)

    Engine.train_step = touch  # type: ignore[method-assign,assignment]
    life.LOOK_SECONDS = 0
    return run(ranks, args, job="7", lead=1e-6)


def folder_lost_at(ranks: Ranks, args: list[str], step: int, to: str | None, again: bool) -> int:
    """Rank 0's run folder is renamed, or removed, while it takes a step; and its path is made again."""
    take, count, run_dir = Engine.train_step, [0], load(args).run_dir

    def lose(*given: Any) -> Any:
        count[0] += 1
        if ranks.is_first and count[0] == step:
            if to:
                run_dir.rename(to)
            else:
                shutil.rmtree(run_dir)
            if again:
                run_dir.mkdir()
        return take(*given)

    Engine.train_step = lose  # type: ignore[method-assign,assignment]
    return run(ranks, args)


def train_what_is_held(ranks: Ranks, args: list[str], checkpoint: str, die_at: int) -> int:
    """As `train_run`. What it begins with is noted as needed before a model is built, which may take long."""
    build = registry.build

    def look(config: Any) -> Any:
        assert needed_by(Path(checkpoint))
        return build(config)

    registry.build = look
    return train_run(ranks, args, die_at)
