"""Which nodes a run avoids, and what keeps that from eating the cluster.

A preflight that finds more bad nodes than the caps allow excludes none of them and stops: so many are no bad nodes, or
somebody has to look at the cluster.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any

from pretrain.job import JobFolder, this_job

AVOIDED_SECONDS = 24 * 3600.0
"""Then a node gets another chance: it was mended, or the next preflight finds it again."""
SHARE = 0.1
"""Of a job's nodes that one preflight may exclude; one at least."""
AT_ONCE = 8
"""Nodes that a run avoids at a time, so in a day."""
EVER = 32
"""Nodes that a run excludes in its whole life."""


def avoided(folder: JobFolder, now: float | None = None) -> list[str]:
    """Nodes that the next submission of a run leaves out: for `sbatch --exclude`."""
    return [record["node"] for record in _in_force(folder.excluded(), time.time() if now is None else now)]


def exclude(folder: JobFolder, bad: Mapping[str, str], num_nodes: int, now: float | None = None) -> str | None:
    """Write bad nodes, with their reasons, to a run's list; all of them or none.

    Args:
        num_nodes: of the job that found them.

    Returns:
        why none was written; None when all were.
    """
    if refusal := refuse(bad, num_nodes, folder.excluded(), this_job()[0], time.time() if now is None else now):
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
        return f"{', '.join(ignored)}: this job has excluded it before, and was given it again"
    allowed = max(1, int(SHARE * num_nodes))
    if len(bad) > allowed:
        return f"{len(bad)} of {num_nodes} nodes are bad, and one start may exclude {allowed}"
    at_once = {record["node"] for record in _in_force(records, now)} | set(bad)
    if len(at_once) > AT_ONCE:
        return f"the run would avoid {len(at_once)} nodes at a time, the most is {AT_ONCE}"
    ever = {record["node"] for record in records} | set(bad)
    if len(ever) > EVER:
        return f"the run would have excluded {len(ever)} nodes, the most is {EVER}"
    return None


def _in_force(records: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    return [record for record in records if now - record["time"] < AVOIDED_SECONDS]
