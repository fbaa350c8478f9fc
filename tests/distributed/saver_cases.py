"""What ranks do in `test_saver.py`: what is being saved would change while it is copied."""

import threading
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
import xxhash

from pretrain.checkpoint import saver
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.engine import snapshot
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.run.checkpoint_folder import complete, step_path
from tests.distributed.cases import a_saver, make_engine, save, train_steps
from tests.distributed.engine_cases import small

RELEASE, TAKEN = threading.Event(), threading.Event()
AT_GATE = 0.2
"""Seconds that a block is held up after the main thread has begun to wait for it."""


class HeldUp(Queue[Any]):
    """The saver's thread takes one block and holds it until the main thread waits for it, or the change is made."""

    waits = True

    def get_nowait(self) -> Any:
        block = super().get_nowait()
        if threading.current_thread() is not threading.main_thread():
            TAKEN.set()
            assert RELEASE.wait(60)
        return block

    def join(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            super().join()
        elif self.waits:
            RELEASE.set()
            super().join()


def change_while_copying(
    ranks: Ranks, root: str, setups: list[list[str]], ways: list[str], sabotage: str = ""
) -> list[dict[str, Any]]:
    """For each set-up and each way to change an engine: its state at a save, after the change, and what was saved."""
    torch._dynamo.config.disable = True  # Muon's kernel as it is written: compiling it takes half a minute
    snapshot.Blocks = HeldUp
    HeldUp.waits = sabotage != "do not wait"
    results = []
    for number, args in enumerate(setups):
        config = small(*args)
        folder = Path(root) / str(number)
        engine = make_engine(ranks, config)
        if "load" in ways:
            RELEASE.set()
            save(engine, folder, 1, ranks)
        for step, way in enumerate(ways, start=2):
            train_steps(engine, ranks, config, step, step)
            wanted = _state(engine)
            RELEASE.clear()
            TAKEN.clear()
            with a_saver(engine, folder, ranks) as subject:
                subject.start(step, {})
                if sabotage == "no gate":
                    engine.snapshot.before_change = lambda: None  # type: ignore[method-assign]
                assert TAKEN.wait(60)
                if way == "load":
                    Checkpoint(step_path(folder, 1)).load(engine)
                elif way == "skip a step":
                    train_steps(engine, ranks, config, step, step, lambda metrics: torch.tensor(torch.nan))
                if way != "load":
                    train_steps(engine, ranks, config, step, step)
                changed = _state(engine)
                RELEASE.set()
                subject.join()
            Checkpoint(step_path(folder, step)).load(engine)
            results.append({"what": f"{way}: {args}", "wanted": wanted, "changed": changed, "saved": _state(engine)})
    return results


def _state(engine: Engine) -> dict[str, Any]:
    """All that this rank saves."""
    state: dict[str, Any] = {name: values.tolist() for name, values in engine.buffers.tensors.items()}
    for fragment in engine.owned_fragments():
        for kind, values in fragment.states.items():
            state[f"{kind} {fragment.name}"] = xxhash.xxh3_128_hexdigest(values.view(torch.uint8).numpy().data)
    return {**state, "steps": engine.optimizer_steps}


def wait_at_the_gate(ranks: Ranks, root: str) -> list[float]:
    """A thread that holds a block for a while longer: how long training is told to have waited for the save."""

    class Slow(HeldUp):
        def join(self) -> None:
            if threading.current_thread() is threading.main_thread() and not RELEASE.is_set():
                threading.Timer(AT_GATE, RELEASE.set).start()
            Queue.join(self)

    snapshot.Blocks = Slow
    config = small()
    engine = make_engine(ranks, config)
    told: list[float] = []
    subject = saver.Saver(
        engine,
        Path(root),
        ranks,
        still_ours=lambda: None,
        sync_journal=lambda: None,
        prune=lambda step: None,
        warn=print,
        published=lambda checkpoint: told.append(checkpoint.blocked),
    )
    with subject:
        subject.start(1, {})
        assert TAKEN.wait(60)
        train_steps(engine, ranks, config, 1, 1)
        subject.join()
    return told


def fail_to_copy(ranks: Ranks, root: str) -> None:
    """Rank 1's thread fails in the copy; training goes on to the edge of the step."""
    copy, main = np.copyto, threading.main_thread()

    def failing(to: Any, source: Any) -> None:
        if ranks.rank == 1 and threading.current_thread() is not main:
            TAKEN.set()
            raise RuntimeError("a bug in the copy")
        copy(to, source)

    config = small()
    engine = make_engine(ranks, config)
    snapshot.np.copyto = failing  # type: ignore[assignment]
    with a_saver(engine, Path(root), ranks) as subject:
        subject.start(1, {})
        assert ranks.rank == 0 or TAKEN.wait(60)
        train_steps(engine, ranks, config, 1, 1)
        print("the step is over", flush=True)
        subject.join()


def leave_while_copying(ranks: Ranks, root: str) -> dict[str, Any]:
    """The run ends with an error right after a save has begun; the engine itself is still as good as before."""
    config = small()
    engine = make_engine(ranks, config)
    error = ""
    try:
        with a_saver(engine, Path(root), ranks) as subject:
            subject.start(1, {})
            raise OSError("the run ends")
    except OSError as raised:
        error = str(raised)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    train_steps(engine, ranks, config, 1, 1)
    return {"error": error, "complete": len(complete(Path(root))), "threads": threads}
