"""Which nodes a run avoids, and what keeps that from eating the cluster.

`python -P -m launch.slurm.exclude RUN_DIR [NODE…]` lists them: those of the run, and of the nodes that Slurm leaves out
for its job today those that are not the run's own.

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
AT_A_TIME, AT_A_TIME_SHARE = 4, 0.01
"""Nodes that a run avoids at a time: the larger of the number and the share of the job's."""
IN_A_MONTH, IN_A_MONTH_SHARE = 32, 0.1
"""… and within MONTH. At the published rate of failures, one in eight a bad node, 512 nodes have some ten."""
MONTH = 30 * 24 * 3600.0


def avoided(folder: JobFolder, now: float | None = None) -> list[str]:
    """Nodes that the next start of a run leaves out: for `sbatch --exclude`."""
    return _within(folder.excluded(), time.time() if now is None else now, AVOIDED_SECONDS)


def to_avoid(folder: JobFolder, named: Collection[str], now: float | None = None) -> set[str]:
    """Nodes that a job's next start leaves out: those in force, and what else the job was submitted to avoid.

    Args:
        named: what Slurm leaves out for the job today. Nodes that this run has excluded, and whose time is over, are
            not carried on.
    """
    ours = {record["node"] for record in folder.excluded()}
    return {*named} - ours | {*avoided(folder, now)}


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
    in_force = {*_within(records, now, AVOIDED_SECONDS)} & {*bad}
    ignored = [record["node"] for record in records if record["node"] in in_force and job and record.get("job") == job]
    if ignored:
        return f"{', '.join(ignored)} was excluded by this job before, and given to it again"
    allowed = max(1, int(SHARE * num_nodes))
    if len(bad) > allowed:
        return f"{len(bad)} of {num_nodes} nodes are bad, and one start may exclude {allowed}"
    for seconds, told, most, share in (
        (AVOIDED_SECONDS, "day", AT_A_TIME, AT_A_TIME_SHARE),
        (MONTH, "month", IN_A_MONTH, IN_A_MONTH_SHARE),
    ):
        nodes, allowed = {*_within(records, now, seconds), *bad}, max(most, int(share * num_nodes))
        if len(nodes) > allowed:
            return f"the run would avoid {len(nodes)} nodes within a {told}, {allowed} are allowed"
    return None


def _within(records: list[dict[str, Any]], now: float, seconds: float) -> list[str]:
    """Nodes excluded so short ago. One that somebody has written without a time stays."""
    return [record["node"] for record in records if now - record.get("time", now) < seconds]


if __name__ == "__main__":
    print(",".join(sorted(to_avoid(JobFolder(Path(sys.argv[1])), sys.argv[2:]))))
