"""Goodput: the share of a run's wall time, over all its attempts, in which it took steps that count."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.metric_names import LOSS, SKIPPED, STEP_MS
from pretrain.run.journal import Record


@dataclass
class Goodput:
    """Productive seconds since the run's first start (seconds since the epoch).

    Wall time goes on while the run is down, starts up, validates or saves. What a rollback superseded was not
    productive, nor was a step that applied no update.
    """

    started: float
    productive: float = 0.0

    def add(self, seconds: float) -> None:
        """Steps that count took this long."""
        self.productive += seconds

    def share(self) -> float:
        """Productive time over wall time, up to now."""
        return self.productive / (time.time() - self.started)


def earlier_goodput(records: Iterable[Record], resumed_from: int, started: float) -> Goodput:
    """What earlier attempts leave to one that goes on from step `resumed_from` (0: from scratch).

    Args:
        records: the run's journal, without the start of this attempt.
        started: when this attempt's program began, in seconds since the epoch.
    """
    first_started: float | None = None
    windows: list[tuple[int, float]] = []  # (last step, productive seconds) from one flush to the next
    productive_steps = 0
    for record in records:
        if record.kind in ("start", "rollback"):
            if first_started is None:
                first_started = record.fields.get("started", record.time / 1e3)
            windows = _up_to(windows, record.fields.get("resumed_from") or 0)
            productive_steps = 0
        elif record.kind == "metrics" and record.step is not None and LOSS in record.metrics:
            productive_steps += SKIPPED not in record.metrics
            if STEP_MS in record.metrics:  # the mean over the window that ends here
                windows.append((record.step, productive_steps * record.metrics[STEP_MS] / 1e3))
                productive_steps = 0
    productive = sum(seconds for _, seconds in _up_to(windows, resumed_from))
    return Goodput(started if first_started is None else first_started, productive)


def _up_to(windows: list[tuple[int, float]], step: int) -> list[tuple[int, float]]:
    return [window for window in windows if window[0] <= step]
