"""Back to an older checkpoint in a live run, and what a later attempt must know of it."""

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import CheckpointError
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.ownership import check_own
from pretrain.config.sections import HealthConfig
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.health.spikes import Spikes, StepLoss
from pretrain.metric_names import LOSS, SKIPPED, STEP_MS
from pretrain.run.checkpoint_folder import complete, needed_by, remove, set_aside
from pretrain.run.journal import Record
from pretrain.run.run_folder import RunFolder


@dataclass
class Past:
    """What a run's journal says about its health up to the step that an attempt goes on from."""

    spikes: Spikes
    num_spikes: int = 0
    num_rollbacks: int = 0
    data: dict[str, Any] | None = None
    """Where the data stand when the run was rolled back to this very step and has saved nothing since."""


class _Heard:
    """What the measure of spikes has heard, in order, without what later starts have superseded.

    16 bytes a step, since a journal may be of millions: a loss, or a mark.
    """

    _JUDGED, _ROLLED_BACK = math.nan, math.inf
    """Up to a step, a window of logging ends; to a step, the run went back."""

    def __init__(self) -> None:
        self._steps, self._losses = array("q"), array("d")

    def loss(self, step: int, loss: float) -> None:
        """Of a step that applied its update."""
        if math.isfinite(loss):
            self._add(step, loss)

    def judged(self, step: int) -> None:
        """The losses since the last time were judged."""
        self._add(step, self._JUDGED)

    def rolled_back(self, step: int) -> None:
        """The run stands at this step again; the limit stays."""
        self._add(step, self._ROLLED_BACK)

    def resumed(self, step: int) -> None:
        """A start goes on from this step, as if nothing had come after it."""
        while self._steps and self._steps[-1] > step:
            self._steps.pop()
            self._losses.pop()

    def tell(self, spikes: Spikes) -> None:
        """All of it to a fresh measure."""
        window: list[StepLoss] = []
        for step, loss in zip(self._steps, self._losses, strict=True):
            if math.isfinite(loss):
                window.append(StepLoss(step, loss, True))
                continue
            if loss == self._ROLLED_BACK:
                spikes.rewind(step)
            else:
                spikes.judge(window)
            window.clear()

    def _add(self, step: int, loss: float) -> None:
        self._steps.append(step)
        self._losses.append(loss)


def read_past(records: Iterable[Record], step: int, config: HealthConfig) -> Past:
    """Of an attempt that goes on from `step`; `records` is the journal without its own start."""
    past, heard = Past(Spikes(config.spike_z, config.spike_window)), _Heard()
    for record in records:
        if record.kind == "start":
            heard.resumed(record.fields.get("resumed_from") or 0)
        elif record.kind == "rollback":
            back_to = record.fields.get("resumed_from") or 0
            heard.rolled_back(back_to)
            past.num_rollbacks += 1
            if back_to <= step:
                past.data = record.fields["data"] if back_to == step else None
        elif record.kind == "checkpoint" and record.step == step:
            past.data = None
        elif record.kind == "spike":
            past.num_spikes += len(record.fields["spikes"])
        elif record.step is not None and LOSS in record.metrics:
            if SKIPPED not in record.metrics:
                heard.loss(record.step, record.metrics[LOSS])
            if STEP_MS in record.metrics:  # the window ends here
                heard.judged(record.step)
    heard.resumed(step)
    heard.tell(past.spikes)
    return past


def load_older(folder: RunFolder, back: int, engine: Engine, ranks: Ranks, warn: Callable[[str], None]) -> int | None:
    """Load the checkpoint `back` places from the newest (1), or the oldest, into a live engine; a collective.

    Those after it are removed, since they lead to where the run must not go again; what adapters of another run change
    gets another name. A damaged one is passed over, and one of another run.

    Returns:
        the step of the checkpoint; None when there is no whole one, and nothing has changed then.
    """
    paths = ranks.together(lambda: complete(folder.checkpoints), only_first=True)
    for path in paths[min(back, len(paths)) - 1 :] if paths else []:

        def load(path: Path = path) -> int:
            found = Checkpoint(path)
            check_own(found, folder)
            found.verify()
            found.load(engine)
            return found.manifest.step

        try:
            step = ranks.together(load)
        except CheckpointError as error:
            warn(f"damaged checkpoint passed over: {error}")
            continue
        for newer in paths[: paths.index(path)] if ranks.is_first else []:
            try:
                if others := needed_by(newer):
                    warn(f"{newer}: needed by {', '.join(others)}; the run goes on without it: now {set_aside(newer)}")
                else:
                    remove(newer)
            except OSError as error:
                warn(f"{newer}: could not be removed: {error}; remove it, since a start would go on from there")
        return step
    return None
