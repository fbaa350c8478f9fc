"""Which nodes a run avoids, and what keeps that from eating the cluster.

`python -P -m launch.slurm.exclude RUN_DIR` lists them.

Who finds more bad nodes than the caps allow excludes none of them: so many are no bad nodes, or somebody has to look at
the cluster.
"""

import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain.run.job_records import JobFolder, this_job

AVOIDED_SECONDS = 24 * 3600.0
"""Then a node gets another chance: it was mended, or the next preflight finds it again."""
SHARE = 0.1
"""Of a job's nodes that one start may exclude; one at least."""
PER_DAY = 4
"""Nodes that a run avoids at a time."""
MOST_EXCLUDED = 32
"""Nodes that a run has ever avoided."""


def avoided(folder: JobFolder, now: float | None = None) -> list[str]:
    """Nodes that the next start of a run leaves out: for `sbatch --exclude`."""
    return _in_force(folder.excluded(), time.time() if now is None else now)


def exclude(folder: JobFolder, bad: Mapping[str, str], num_nodes: int, now: float | None = None) -> str | None:
    """Write bad nodes, with their reasons, to a run's list; all of them or none.

    Args:
        num_nodes: of the job that found them.

    Returns:
        why none was written; None when all were.
    """
    job, _ = this_job()
    if refusal := refuse(bad, num_nodes, folder.excluded(), job, time.time() if now is None else now):
        return refusal
    for node, reason in bad.items():
        folder.exclude(node, reason)
    return None


def refuse(
    bad: Collection[str], num_nodes: int, records: list[dict[str, Any]], job: str | None, now: float
) -> str | None:
    """Which of the caps forbids to exclude these nodes; None when none does. `records`: of a run, one a node."""
    ignored = [record["node"] for record in records if record["node"] in bad and job and record.get("job") == job]
    if ignored:
        return f"{', '.join(ignored)} was excluded by this job before, and given to it again"
    allowed = max(1, int(SHARE * num_nodes))
    if len(bad) > allowed:
        return f"{len(bad)} of {num_nodes} nodes are bad, and one start may exclude {allowed}"
    today = {*_in_force(records, now), *bad}
    if len(today) > PER_DAY:
        return f"the run would avoid {len(today)} nodes in one day, {PER_DAY} are allowed"
    ever = {*(record["node"] for record in records), *bad}
    if len(ever) > MOST_EXCLUDED:
        return f"the run would have excluded {len(ever)} nodes in all, {MOST_EXCLUDED} are allowed"
    return None


def _in_force(records: list[dict[str, Any]], now: float) -> list[str]:
    """One that somebody has written without a time stays."""
    return [record["node"] for record in records if now - record.get("time", now) < AVOIDED_SECONDS]


if __name__ == "__main__":
    print(",".join(avoided(JobFolder(Path(sys.argv[1])))))
