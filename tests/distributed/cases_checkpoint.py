"""What ranks do in the tests of checkpoints."""

import itertools
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import CheckpointError
from model.architectures import registry
from pretrain.checkpoint import checkpoint, retention, saver, shard_file
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.health.rollback import load_older
from pretrain.inference.trained import saved_config
from pretrain.run.checkpoint_folder import complete, hold, step_path
from pretrain.run.lease import LeaseLost
from pretrain.run.run_folder import RunFolder
from tests.checkpoints import manifest_of
from tests.distributed.cases import a_saver, digest, make_engine, save, small_config, train_steps

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
SAVED, LAST = 3, 6


def save_at_every_stage(ranks: Ranks, root: str, precision: str) -> dict[str, Any]:
    """Train to LAST without a break, and save on the way: by source, `<stage>-<ranks>`."""
    results = {}
    for stage in STAGES[precision]:
        config = small_config(stage, precision)
        engine = make_engine(ranks, config)
        source = f"{stage}-{ranks.world_size}"
        train_steps(engine, ranks, config, 1, SAVED)
        saved = digest(engine, ranks)
        save(engine, Path(root) / source, SAVED, ranks)
        losses = train_steps(engine, ranks, config, SAVED + 1, LAST)
        results[source] = {"saved": saved, "losses": losses, "final": digest(engine, ranks)}
    return results


def load_at_every_stage(ranks: Ranks, root: str, precision: str, sabotage: bool = False) -> dict[str, Any]:
    """Each source into an engine of each stage, which has trained on other weights.

    Then a step; on the stage and number of ranks of the source all steps to LAST.
    """
    if sabotage:
        Checkpoint.load = lambda self, engine: None  # type: ignore[method-assign]
    results: dict[str, Any] = {}
    for stage in STAGES[precision]:
        config = small_config(stage, precision)
        engine = make_engine(ranks, config, seed=99)
        for source in sorted(Path(root).iterdir()):
            if not results:
                train_steps(engine, ranks, config, 11, 11)
            before = digest(engine, ranks)
            step = _load_newest(engine, ranks, source)
            loaded = digest(engine, ranks)
            same = source.name == f"{stage}-{ranks.world_size}"
            losses = train_steps(engine, ranks, config, step + 1, LAST if same else step + 1)
            final = digest(engine, ranks) if same else None
            results[f"{source.name} to {stage}-{ranks.world_size}"] = {
                "step": step,
                "before": before,
                "loaded": loaded,
                "losses": losses,
                "final": final,
            }
    return results


def resume_at_each_step(ranks: Ranks, root: str, precision: str) -> dict[str, Any]:
    """From each stage's checkpoint on the same number of ranks: load, one step, save; again in a new engine."""
    results = {}
    for stage in STAGES[precision]:
        config = small_config(stage, precision)
        folder = Path(root) / f"{stage}-{ranks.world_size}"
        losses, resumed_from = [], []
        for step in range(SAVED + 1, LAST + 1):
            engine = make_engine(ranks, config, seed=step)
            resumed_from.append(_load_newest(engine, ranks, folder))
            losses += train_steps(engine, ranks, config, step, step)
            save(engine, folder, step, ranks)
        results[folder.name] = {"from": resumed_from, "losses": losses, "final": digest(engine, ranks)}
    return results


def go_on(ranks: Ranks, root: str, stage: int) -> dict[str, Any]:
    """Load the newest checkpoint if there is one, train two steps, save."""
    config = small_config(stage, "fp32")
    begun = bool(list(Path(root).iterdir()))
    engine = make_engine(ranks, config, seed=99 if begun else 0)
    step = _load_newest(engine, ranks, Path(root)) if begun else 0
    loaded = digest(engine, ranks)
    losses = train_steps(engine, ranks, config, step + 1, step + 2)
    save(engine, Path(root), step + 2, ranks)
    return {"from": step, "loaded": loaded, "losses": losses, "saved": digest(engine, ranks)}


def draw(ranks: Ranks, root: str, resumed: bool) -> list[list[float]]:
    """Random numbers of every generator: after a save, or after it was loaded."""
    config = small_config(1, "fp32")
    engine = make_engine(ranks, config)
    torch.manual_seed(ranks.rank)
    np.random.seed(ranks.rank)
    random.seed(ranks.rank)
    if resumed:
        found = checkpoint.newest(Path(root), ranks, print)
        assert found
        found.restore_rng(ranks)
    else:
        _numbers()  # leaves a second normal number waiting in numpy and in python
        save(engine, Path(root), 1, ranks)
    return [_numbers(), _numbers()]


def _numbers() -> list[float]:
    return [float(torch.rand(())), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()]


def snapshots(ranks: Ranks, root: str) -> dict[str, Any]:
    """Steps go on while the thread is held up, then a second save has to wait for the first."""
    config = small_config(2, "bf16")
    engine = make_engine(ranks, config)
    release = threading.Event()
    blocks, join = shard_file._blocks, saver.Saver.join
    manifest = Path(root) / "step-000000002" / "manifest.json"

    def held_up(*args: Any) -> Iterator[Any]:
        assert release.wait(60)
        yield from blocks(*args)

    shard_file._blocks = held_up  # type: ignore[assignment]
    train_steps(engine, ranks, config, 1, 2)
    saved = [digest(engine, ranks)]
    with a_saver(engine, Path(root), ranks) as subject:
        subject.start(2, {})
        pointers = [{state: buffer.data_ptr() for state, buffer in engine.snapshot.tensors.items()}]
        polls = []
        for step in (3, 4, 5):
            train_steps(engine, ranks, config, step, step)
            [writing] = ranks.largest(subject.writing)
            subject.poll(bool(writing))
            polls.append((writing, manifest.exists()))
        saved.append(digest(engine, ranks))

        def waiting(self: saver.Saver) -> None:
            assert not manifest.exists()
            release.set()
            join(self)
            assert manifest.exists()

        saver.Saver.join = waiting  # type: ignore[method-assign]
        subject.start(5, {})
        saver.Saver.join = join  # type: ignore[method-assign]
        train_steps(engine, ranks, config, 6, 6)
        subject.join()
        pointers.append({state: buffer.data_ptr() for state, buffer in engine.snapshot.tensors.items()})
    loaded = []
    for step in (2, 5):
        Checkpoint(step_path(Path(root), step)).load(engine)
        loaded.append(digest(engine, ranks))
    return {"saved": saved, "loaded": loaded, "polls": polls, "pointers": pointers}


def disk_full(ranks: Ranks, root: str) -> dict[str, Any]:
    """Rank 1's file system refuses files above 2 KB, as a full disk would, at the second save."""
    config = small_config(1, "fp32")
    engine = make_engine(ranks, config)
    train_steps(engine, ranks, config, 1, 2)
    saved = digest(engine, ranks)
    save(engine, Path(root), 2, ranks)
    if ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with a_saver(engine, Path(root), ranks) as subject:
        subject.start(3, {})
        try:
            for step in itertools.count(3):
                train_steps(engine, ranks, config, step, step)
                [writing] = ranks.largest(subject.writing)
                subject.poll(bool(writing))
        except CheckpointError as error:
            left = sorted(path.name for path in (Path(root) / "step-000000003").iterdir())
            step = _load_newest(engine, ranks, Path(root))
            return {"error": str(error), "left": left, "step": step, "whole": digest(engine, ranks) == saved}
    raise AssertionError("never reached")


def taken_over(ranks: Ranks, root: str) -> dict[str, Any]:
    """The run folder is no longer ours when the second save is about to be published; old ones may not be removed."""

    def lost() -> None:
        if threading.current_thread() is not threading.main_thread():  # the main one looks when the save begins
            raise LeaseLost("taken over")

    engine = make_engine(ranks, small_config(1, "fp32"))
    save(engine, Path(root), 1, ranks)
    with a_saver(engine, Path(root), ranks, keep=1, still_ours=lost) as subject:
        subject.start(2, {})
        try:
            subject.join()
        except LeaseLost as error:
            return {"error": str(error), "complete": [path.name for path in complete(Path(root))]}
    raise AssertionError("it was published")


def clean_up_fails(ranks: Ranks, root: str) -> dict[str, Any]:
    """No old checkpoint can be removed while two more are saved."""

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    retention.remove = refuse
    engine = make_engine(ranks, small_config(1, "fp32"))
    warnings: list[str] = []
    with a_saver(engine, Path(root), ranks, keep=1, warn=warnings.append) as subject:
        for step in (1, 2, 3):
            subject.start(step, {})
            subject.join()
    return {"warnings": warnings, "complete": len(complete(Path(root)))}


def back_and_again(ranks: Ranks, root: str) -> dict[str, Any]:
    """Two saves, the second validated and needed by another run; back behind it, and on to the same step."""
    folder, other = RunFolder(Path(root)), Path(root) / "other"
    other.mkdir()
    (other / "run.json").touch()
    config = small_config(1, "fp32")
    folder.claim(config, {"fingerprint": "f", "path": "p"})
    engine = make_engine(ranks, config)
    warnings: list[str] = []
    with a_saver(engine, folder.checkpoints, ranks) as subject:
        subject.start(1, {})
        subject.start(2, {})
        subject.validated(2, 1.5)
        subject.join()
        hold(step_path(folder.checkpoints, 2), other)
        step = load_older(folder, 2, engine, ranks, warnings.append)
        subject.start(2, {})
        subject.join()
    found = {path.name: manifest_of(path)["validation_loss"] for path in folder.checkpoints.iterdir()}
    return {"step": step, "warnings": warnings, "losses": found}


PHASES = ["no save", "before the shards", "in a shard", "between shards", "before the manifest", "after the manifest"]
PHASES += ["in retention"]


def die_while_saving(
    ranks: Ranks, root: str, victim: int, at: str | None = None, after: float | None = None, steps_between: int = 0
) -> None:
    """Train, save, train on while it is written, and so on, until SIGKILL.

    The victim dies when it enters the phase `at` of its second save, after `steps_between` steps if the thread is the
    one to enter it; or `after` seconds from there, in whatever phase it is. `<root>/phases` holds a byte of each rank:
    its phase, as an index of PHASES; then a byte of each: the steps it has taken during this save. `<root>/digests/N`
    is written before the save of step N.
    """
    path = Path(root)
    phases = os.open(path / "phases", os.O_RDWR | os.O_CREAT)
    armed = threading.Event()
    steps = 0
    enough_steps = threading.Event()

    def enter(phase: str) -> None:
        if armed.is_set() and ranks.rank == victim and phase == at:
            if threading.current_thread() is not threading.main_thread() and steps_between:
                assert enough_steps.wait(60)
            os.pwrite(phases, bytes([PHASES.index(phase)]), ranks.rank)
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(phases, bytes([PHASES.index(phase)]), ranks.rank)
        if after is not None:
            time.sleep(0.02)  # so that a kill at a random time finds each phase

    write, blocks, write_atomic, remove = saver.write_tensors, shard_file._blocks, saver.write_atomic, retention.remove

    def watched_write(*args: Any) -> Any:
        enter("before the shards")
        result = write(*args)
        enter("between shards")
        return result

    def watched_blocks(*args: Any) -> Iterator[Any]:
        for number, block in enumerate(blocks(*args)):
            yield block
            if number == 3:
                enter("in a shard")

    def watched_manifest(file: Path, content: bytes) -> None:
        enter("before the manifest")
        write_atomic(file, content)
        enter("after the manifest")

    def watched_remove(folder: Path) -> None:
        (folder / "manifest.json").unlink(missing_ok=True)
        os.truncate(folder / "shard-00000.safetensors", 100)
        enter("in retention")
        remove(folder)
        os.pwrite(phases, bytes([0]), ranks.rank)

    shard_file.BLOCK = 1000
    for module, name, watched in (
        (saver, "write_tensors", watched_write),
        (shard_file, "_blocks", watched_blocks),
        (saver, "write_atomic", watched_manifest),
        (retention, "remove", watched_remove),
    ):
        setattr(module, name, watched)
    config = small_config(1, "fp32")
    engine = make_engine(ranks, config)
    train_steps(engine, ranks, config, 1, 2)
    with a_saver(engine, path / "checkpoints", ranks, keep=1) as subject:
        step = 2
        while True:
            os.pwrite(phases, bytes([0]), ranks.rank)
            os.pwrite(phases, bytes([0]), ranks.world_size + ranks.rank)
            steps = 0
            state = digest(engine, ranks)
            if ranks.is_first:
                (path / "digests" / f"{step}.tmp").write_text(json.dumps(state))
                (path / "digests" / f"{step}.tmp").rename(path / "digests" / str(step))
            if step > 2 and not armed.is_set():
                enough_steps.clear()
                armed.set()
                if after is not None and ranks.rank == victim:
                    threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            subject.start(step, {})
            busy = 1
            while busy:
                step += 1
                train_steps(engine, ranks, config, step, step)
                steps += 1
                os.pwrite(phases, bytes([min(steps, 255)]), ranks.world_size + ranks.rank)
                if steps >= steps_between:
                    enough_steps.set()
                [writing] = ranks.largest(subject.writing)
                subject.poll(bool(writing))
                [busy] = ranks.largest(subject._save is not None)


def load_after_death(ranks: Ranks, root: str) -> dict[str, Any]:
    """What a new start finds, bit for bit; and that it can train and save on."""
    config = small_config(1, "fp32")
    engine = make_engine(ranks, config, seed=99)
    warnings: list[str] = []
    found = checkpoint.newest(Path(root), ranks, warnings.append)
    assert found
    found.load(engine)
    return {"step": found.manifest.step, "loaded": digest(engine, ranks), "warnings": warnings}


def _load_newest(engine: Engine, ranks: Ranks, root: Path) -> int:
    found = checkpoint.newest(root, ranks, lambda text: print(text, file=sys.stderr))
    assert found
    found.load(engine)
    return found.manifest.step


def copy_at_stage(ranks: Ranks, path: str, root: str, stage: int) -> None:
    """Load a run's checkpoint at another stage, and save it again as it is."""
    source = Checkpoint(Path(path))
    config = saved_config(source)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": stage})})
    engine = Engine(registry.build(config.model), config, ranks)
    source.load(engine)
    with a_saver(engine, Path(root), ranks) as subject:
        subject.start(source.manifest.step, source.manifest.state, source.manifest.validation_loss)
        subject.join()


def read_export(ranks: Ranks, exported: str, path: str) -> dict[str, Any]:
    """DeepSpeed's own tool reads what was exported: the largest difference from the checkpoint's weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(exported)
    weights = Checkpoint(Path(path)).weights()
    return {name: float((found[name].view_as(values) - values).abs().max()) for name, values in weights.items()}
