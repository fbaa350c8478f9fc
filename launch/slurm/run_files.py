"""What the folders of runs say, for `duet status`: as far as they can be read, and quickly. Free of torch."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.files.sealed import unseal
from pretrain.run.checkpoint_folder import MANIFEST, complete, step_of
from pretrain.run.job_records import Failure, Heartbeat, JobFolder
from pretrain.run.run_listing import RunState, run_folders, run_state

MOST_JOBS = 16
"""Newest submissions of a run that Slurm is asked about."""


class RunFiles(NamedTuple):
    """What the folder of a run says."""

    path: Path
    run: RunState
    heartbeat: Heartbeat | None
    jobs: list[str]
    """Newest last."""
    total: int | None
    """Steps."""
    batch_tokens: float | None
    hang_seconds: float
    """Without a step for so long, something is wrong."""
    checkpoint: int | None
    checkpoint_time: float | None
    asked_to_stop: bool
    excluded: list[dict[str, Any]]
    failures: list[Failure]
    decision: dict[str, Any]
    """The last of `launch.slurm.policy`; empty when there is none."""


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among `paths`, and those in them, of sweeps and studies, too.

    Raises:
        RunError: a folder that is not there.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such folder; expected a run folder, or one that holds some, such as runs")
        found |= dict.fromkeys(run_folders(path))
    return list(found)


def read_files(path: Path) -> RunFiles:
    """What the folder of a run says, as far as it can be read."""
    run, folder = run_state(path), JobFolder(path)
    heartbeat = folder.last_heartbeat()
    if heartbeat and not (isinstance(heartbeat.step, int) and isinstance(heartbeat.time, float)):
        heartbeat = None
    config = _recorded(path / "run.json") or _config(path / "config.yaml") or _config(folder.config)
    hang_minutes = _number(config, "health", "hang_minutes") or (_number(config, "engine", "timeout_minutes") or 10) / 2
    checkpoint, checkpoint_time = _newest_checkpoint(path)
    started_in = [job for job in (run.job, heartbeat.job if heartbeat else None) if job]
    submitted = [str(record["job"]) for record in folder.submissions() if "job" in record]
    return RunFiles(
        path=path,
        run=run,
        heartbeat=heartbeat,
        jobs=list(dict.fromkeys([*started_in, *submitted[-MOST_JOBS:]])),
        total=None if (steps := _number(config, "train", "steps")) is None else int(steps),
        batch_tokens=_number(config, "batch", "tokens"),
        hang_seconds=60 * hang_minutes,
        checkpoint=checkpoint,
        checkpoint_time=checkpoint_time,
        asked_to_stop=folder.kill_switch.exists(),
        excluded=folder.excluded(),
        failures=folder.failures(),
        decision=next(reversed(folder.decisions()), {}),
    )


def _recorded(file: Path) -> dict[str, Any]:
    """The configuration that a run last went on with; nothing before format 2."""
    try:
        config = unseal(file.read_bytes(), formats=()).get("config")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(config: dict[str, Any], section: str, key: str) -> float | None:
    values = config.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int | float) else None


def _newest_checkpoint(path: Path) -> tuple[int | None, float | None]:
    """Its step, and when it was complete."""
    with contextlib.suppress(CheckpointError):  # not to be listed: nothing is known
        for checkpoint in complete(path / "checkpoints"):
            with contextlib.suppress(OSError):  # the run may just make room
                return step_of(checkpoint), (checkpoint / MANIFEST).stat().st_mtime
    return None, None
