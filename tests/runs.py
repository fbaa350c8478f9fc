"""Small real runs for tests, and what their journals must prove."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pretrain.run.journal import Record, read
from pretrain.tracking.mlflow_store import connect
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "model.learned_dropout.entropy.start_step=0",
    "batch.tokens=128",
    "schedule.warmup_steps=3",
    "optimizer.lr=0.01",
    "engine.precision=fp32",
    "tracking.mode=off",
    "train.log_every=1",
    "train.sample_tokens=0",
    "train.eval_tokens=all",
]
"""A model and a batch that take milliseconds a step; noise and both penalties on."""
CHARACTERS, MARKED = "data/characters", "data/characters-marked"


def duet(
    *args: str, cwd: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, without its start."""
    return program("launch.cli", *args, cwd=cwd, timeout=timeout, **environment)


def program(
    module: str, *args: str, cwd: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -P -m MODULE ARGUMENT…` to its end, forked from a process that has imported what it imports."""
    ours = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        descriptors = [file.fileno() for file in (nothing, out, err)]
        code = warm.call(module, args, str(cwd or Path.cwd()), ours, descriptors, timeout)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([module, *args], code, *said)


def new_store(path: Path) -> None:
    """An empty store of MLflow's: of a session's the first is made, the others are copies."""
    template = Path(os.environ[warm.FOLDER], "mlflow.db")
    with warm.locked(str(template.parent)):
        if not template.exists():
            connect(f"sqlite:///{template}.new")
            os.replace(f"{template}.new", template)
    shutil.copy(template, path)


def build_dataset(preset: str, path: Path) -> Path:
    """The licence's text, by a preset of data."""
    source = f"data.sources.text.paths=[{ROOT / 'LICENSE'}]"
    done = duet("data", "build", preset, source, f"data.path={path}")
    assert done.returncode == 0, done.stderr
    return path


def start_duet(*args: str, log: Path, cwd: Path | None = None, new: bool = False) -> subprocess.Popen[bytes]:
    """Start the command line in a session of its own; `new`: in processes that are no forks, ranks as well."""
    start = [sys.executable, "-P", "-m", "launch.cli"] if new else warm.command("launch.cli")
    with open(log, "ab") as file:
        return subprocess.Popen(
            # As from a terminal: a shell's background job is born with SIGINT ignored.
            ["env", "--default-signal=INT", *start, *args],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def wait_for_step(journal: Path, step: int, process: subprocess.Popen[bytes], timeout: float = 120) -> None:
    """Until the journal holds a step."""
    end = time.monotonic() + timeout
    while True:
        code = process.poll()  # before the look: it may reach the step and end meanwhile
        if journal.exists() and any((r.step or 0) >= step for r in read(journal) if r.kind == "metrics"):
            return
        assert code is None, f"the run ended early with code {code}"
        assert time.monotonic() < end, f"step {step} not reached"
        time.sleep(0.02)


def ranks_of(run_dir: Path, rank: int | None = None) -> list[int]:
    """Live rank processes of a run folder, all or one rank's, found by their command line."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_text().split("\0")
                if "tests.parent" in words:
                    words = warm.recorded(int(process.name))
                else:
                    words += (process / "environ").read_text().split("\0")
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, UnicodeDecodeError):
                continue
            ours = {"pretrain", f"run.dir={run_dir}", *([] if rank is None else [f"RANK={rank}"])}
            if ours <= set(words) and state not in "ZX":
                found.append(int(process.name))
    return found


def wait_until_gone(run_dir: Path, timeout: float = 60) -> None:
    """Until no rank of a run is alive."""
    end = time.monotonic() + timeout
    while alive := ranks_of(run_dir):
        assert time.monotonic() < end, f"ranks {alive} outlived their launcher"
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, and reap."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def attempts(journal: Path) -> list[tuple[int | None, dict[int, dict[str, float]]]]:
    """Of each attempt: the step it resumed from, and the metrics of each training step it took."""
    result: list[tuple[int | None, dict[int, dict[str, float]]]] = []
    for record in read(journal):
        if record.kind == "start":
            result.append((record.fields["resumed_from"], {}))
        elif record.kind == "metrics" and "loss/train" in record.metrics:
            assert record.step is not None
            result[-1][1][record.step] = record.metrics
    return result


def newest_on_disk(run_dir: Path) -> int | None:
    """Step of a run's newest checkpoint: what a start is to go on from. A kill can come before the journal's word."""
    return max((int(m.parent.name[5:]) for m in run_dir.glob("checkpoints/*/manifest.json")), default=None)


def check_resumed(
    journal: Path, reference: Path, interval: int, on_disk: Sequence[int | None], stops: Collection[int] = ()
) -> int:
    """Prove from its journal that a run resumed and that it learned what the uninterrupted reference did.

    Every step's loss is bit for bit the reference's, in every attempt; each later attempt began right after the
    newest checkpoint, and computed at most twice `interval` steps again: those since a save, and those during it.
    Returns the number of attempts.

    Args:
        on_disk: of each later attempt, what `newest_on_disk` was before it.
        stops: steps at which a signal made a run save; nothing is computed again after those.
    """
    [(_, expected)] = attempts(reference)
    found = attempts(journal)
    assert len(found) == len(on_disk) + 1
    done: dict[int, dict[str, float]] = {}
    for number, (resumed_from, steps) in enumerate(found):
        if number:
            newest = on_disk[number - 1]
            assert resumed_from == newest, "not from the newest checkpoint"
            assert (newest or 0) >= _newest_told(read(journal), number), "a checkpoint was lost"
            assert resumed_from is None or resumed_from in (1, *stops) or resumed_from % interval == 0
            if steps:
                assert min(steps) == (resumed_from or 0) + 1
            assert len(steps.keys() & done.keys()) <= (0 if resumed_from in stops else 2 * interval)
        for step, metrics in steps.items():
            for name in ("loss/total", "loss/train", "penalty/entropy", "penalty/l1", "optim/grad_norm"):
                assert metrics[name] == expected[step][name], f"step {step}: {name} differs"
        done |= steps
    assert done.keys() == expected.keys()
    return len(found)


def _newest_told(records: Iterable[Record], attempt: int) -> int:
    """Step of the last checkpoint that the journal tells of before attempt number `attempt` (from 0)."""
    starts, newest = -1, 0
    for record in records:
        if record.kind == "start":
            starts += 1
            if starts == attempt:
                return newest
        elif record.kind == "checkpoint":
            newest = record.step or 0
    return newest


def documented_architecture() -> str:
    """The file that docs/your-architecture.md writes."""
    text = (ROOT / "docs" / "your-architecture.md").read_text()
    return text.partition("<<'END'\n")[2].partition("\nEND\n")[0] + "\n"
