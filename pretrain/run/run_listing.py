"""What runs there are and how they stand, from their folders alone. Free of torch, mlflow and pyarrow.

Only the end of a journal is read, so that a folder of hundreds of long runs is listed at once.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from pretrain.metric_names import LOSS, TOKENS_PER_SECOND
from pretrain.run.checkpoint_folder import complete, step_of
from pretrain.run.journal import Record, read_from
from pretrain.run.lease import alive, attempt_path, latest_attempt, read_owner

TAIL_BYTES = 1 << 16
MOST_TAIL_BYTES = 1 << 22
"""The speed stands on one line in `train.log_every`, and a line can be long: look this far back for it."""
MOST_DEEP = 5
"""How far below a folder runs are looked for: a study's are in runs/STUDY/SECTION/SETTING/ARM/seed-N."""
FILES = "mlartifacts"
"""Where MLflow keeps files beside its database: many folders, and none of them a run's."""


@dataclass(frozen=True)
class RunState:
    """How a run stands; None is what is not known."""

    path: str
    state: str
    """running, finished, killed or failed; dead: no end was written, and the owner is gone; unreadable."""
    step: int | None
    loss: float | None
    """Of the last training step, in nats per token."""
    tokens_per_second: float | None
    job: str | None
    """Slurm's number of the newest attempt."""
    attempts: int
    started: float
    """When the newest attempt began, in seconds since the epoch."""
    problem: str = ""
    """Why it is unreadable, or has failed."""


def list_runs(folder: Path) -> list[RunState]:
    """The runs in a folder, or the one that the folder is, that have started; the newest first.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; expected one that holds run folders, such as runs")
    paths = [path for path in run_folders(folder) if (path / "metrics.jsonl").is_file() or (path / "attempts").is_dir()]
    return sorted((run_state(path) for path in paths), key=lambda run: run.started, reverse=True)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it was submitted, or has started."""
    return any((path / name).exists() for name in ("run.json", "metrics.jsonl", "attempts", "slurm/jobs.jsonl"))


def run_folders(folder: Path, deep: int = MOST_DEEP) -> Iterator[Path]:
    """Run folders in a folder, or the one that it is, in order; those of sweeps and of studies, too."""
    if is_run(folder):
        yield folder
    elif deep:
        for path in sorted(folder.iterdir()):
            links = path.name == "slurm" and not is_run(path)  # of a sweep, to its runs
            if path.is_dir() and path.name[0] != "." and path.name != FILES and not links:
                with suppress(PermissionError):  # of another user
                    yield from run_folders(path, deep - 1)


def run_state(run_dir: Path) -> RunState:
    """How one run stands."""
    attempt = latest_attempt(run_dir)
    attempt_file = attempt_path(run_dir / "attempts", attempt)
    journal = run_dir / "metrics.jsonl"
    owner: dict[str, Any] = {}
    problem = ""
    try:
        owner = _owner(attempt_file) if attempt else {}
        records = tail(journal) if journal.is_file() else []
        if records and all(record.kind == "damaged" for record in records):
            raise RunError(f"{run_dir}: {records[0].fields['text']}")
    except (RunError, OSError) as error:  # one damaged run must not hide the others
        records, state, problem = [], "unreadable", str(error)
    else:
        state = _state(owner, attempt_file, records)
        problem = str(owner.get("reason", "")) if state == "failed" else ""
    steps = [record for record in records if record.kind == "metrics"]
    return RunState(
        path=str(run_dir),
        state=state,
        step=steps[-1].step if steps else None,
        loss=_last(steps, LOSS),
        tokens_per_second=_last(steps, TOKENS_PER_SECOND),
        job=owner.get("job"),
        attempts=attempt,
        started=owner["started"] if owner else run_dir.stat().st_mtime,
        problem=problem,
    )


@dataclass(frozen=True)
class End:
    """How a start of a run ended that had saved all it trained: what befell its processes later does not count."""

    finished: bool
    """All steps are done."""
    reason: str
    code: int
    """The exit code that goes with it."""


def recorded_end(run_dir: Path, **owner: Any) -> End | None:
    """Of the newest start, if it is the one whose record has these fields (`job`, `restart`, `pid`); None: no end is
    recorded, or the start failed, or another one was the last."""
    attempt = latest_attempt(run_dir)
    journal = run_dir / "metrics.jsonl"
    try:
        record = _owner(attempt_path(run_dir / "attempts", attempt)) if attempt else {}
        if not record or any(record.get(name) != value for name, value in owner.items()):
            return None
        turns = [record for record in tail(journal) if record.kind in ("start", "end")]
    except (RunError, OSError):  # what cannot be read tells of no end
        return None
    last = turns[-1] if turns else None
    if not last or last.kind != "end" or last.attempt != attempt or last.fields.get("code") is None:
        return None
    return End(last.fields["status"] == "FINISHED", str(last.fields["reason"]), int(last.fields["code"]))


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of a run's complete checkpoints, in order.

    Raises:
        CheckpointError: the folder that holds them cannot be listed.
    """
    return sorted(step for path in complete(run_dir / "checkpoints") if (step := step_of(path)) is not None)


def _owner(attempt_file: Path) -> dict[str, Any]:
    owner = read_owner(attempt_file)
    if owner is None:
        raise RunError(
            f"{attempt_file}: damaged; the next start of the run sees from its heartbeat whether it is owned"
        )
    return owner


def _state(owner: dict[str, Any], attempt_file: Path, records: list[Record]) -> str:
    turns = [record for record in records if record.kind in ("start", "end")]
    end = turns[-1] if turns and turns[-1].kind == "end" else None
    if owner and not (end and end.attempt == owner["attempt"]) and alive(owner, attempt_file, time.time()):
        return "running"
    if end:
        return str(end.fields["status"]).lower()
    return "failed" if "ended" in owner else "dead"


def tail(journal: Path) -> list[Record]:
    """The last records of a journal: as many as it takes to have the loss and the speed among them."""
    length, size = TAIL_BYTES, journal.stat().st_size
    while True:
        start = max(0, size - length)
        with open(journal, "rb") as file:
            file.seek(start)
            if start:
                file.readline()  # most likely the rest of a line
            start = file.tell()
        records = [record for record, _ in read_from(journal, start)]
        known = _last(records, LOSS) is not None and _last(records, TOKENS_PER_SECOND) is not None
        if known or length >= min(size, MOST_TAIL_BYTES):
            return records
        length *= 8


def _last(records: list[Record], name: str) -> float | None:
    return next((record.metrics[name] for record in reversed(records) if name in record.metrics), None)
