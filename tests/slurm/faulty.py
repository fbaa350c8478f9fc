"""The real trainer, but for its report, with faults at chosen places: what `python -P -m pretrain` is in a drill.

DRILL_FAULTS holds a JSON list. A fault is of one start of the job (`restart`, 0 first) and one `rank`, and either

    {"restart", "rank", "step", "folder"}: in the middle of this step the rank writes held-RESTART-RANK-STEP in the
        folder and waits for a stop signal, for the file go-RESTART-RANK-STEP, or for its death;
    {"restart", "rank", "step", "error"}: in the middle of this step the rank has a bug that raises this;
    {"restart", "rank", "step", "phase"}: SIGKILL when it enters this phase of saving the step.

The report is left out, or with DRILL_REPORT comes so many seconds late.
"""

import json
import os
import runpy
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

PHASES = ["before the shards", "between shards", "before the manifest", "after the manifest", "in retention"]
PLACE = "{restart}-{rank}-{step}"
stops: list[Any] = []
"""Where this rank learns of a request to stop."""


def main() -> None:
    """Arms the faults when the trainer reads its configuration: signals are handled by then, torch is not there yet."""
    from pretrain.config import schema as config
    from pretrain.report import report
    from pretrain.run import signals

    load, remember = config.load, signals.StopRequest.__init__

    def remember_stop(self: Any) -> None:
        remember(self)
        stops.append(self)

    def load_and_arm(args: list[str]) -> Any:
        restart, rank = int(os.environ.get("SLURM_RESTART_COUNT", 0)), int(os.environ["SLURM_PROCID"])
        for fault in json.loads(os.environ["DRILL_FAULTS"]):
            if (fault["restart"], fault["rank"]) == (restart, rank):
                (die if "phase" in fault else stand)(fault)
        return load(args)

    write, seconds = report.write, float(os.environ.get("DRILL_REPORT", -1))

    def write_slowly(runs: list[Any], out: Path) -> None:
        if seconds >= 0:  # else not at all: its pictures take longer than all the steps
            time.sleep(seconds)
            write(runs, out)

    report.write = write_slowly
    signals.StopRequest.__init__ = remember_stop  # type: ignore[method-assign]
    config.load = load_and_arm
    runpy.run_module("pretrain", run_name="__main__", alter_sys=True)


def stand(fault: dict[str, Any]) -> None:
    """Hold the rank in a step, or end it there with an error."""
    from pretrain import trainer
    from pretrain.engine.engine import Engine

    train_step, learning_rate = Engine.train_step, trainer.learning_rate
    now = 0
    place = PLACE.format_map(fault)
    folder = Path(fault["folder"])
    held, go = folder / f"held-{place}", folder / f"go-{place}"

    def remember_step(config: Any, tokens: int) -> float:
        nonlocal now
        now = tokens // config.batch.tokens
        return learning_rate(config, tokens)

    def step(*args: Any) -> Any:
        if now == fault["step"] and "error" in fault:
            raise RuntimeError(fault["error"])
        if now == fault["step"]:
            held.write_text(str(os.getpid()))
            while not stops[0].signal and not go.exists():
                time.sleep(0.005)
        return train_step(*args)

    trainer.learning_rate = remember_step
    Engine.train_step = step  # type: ignore[method-assign,assignment]


def die(fault: dict[str, Any]) -> None:
    """End the rank in a phase of a save."""
    from pretrain.checkpoint import retention, saver

    saving = None
    start, write, write_atomic, remove = saver.Saver.start, saver.write_tensors, saver.write_atomic, retention.remove

    def enter(phase: str) -> None:
        if saving == fault["step"] and phase == fault["phase"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_start(self: Any, step: int, *args: Any) -> None:
        nonlocal saving
        self.join()
        saving = step
        start(self, step, *args)

    def watched(before: str, work: Any, after: str | None, *args: Any) -> Any:
        enter(before)
        result = work(*args)
        if after:
            enter(after)
        return result

    saver.Saver.start = watched_start  # type: ignore[method-assign,assignment]
    saver.write_tensors = partial(watched, "before the shards", write, "between shards")
    saver.write_atomic = partial(watched, "before the manifest", write_atomic, "after the manifest")
    retention.remove = partial(watched, "in retention", remove, None)


if __name__ == "__main__":
    main()
