"""A rank's part in the life of its job: requests to stop that all ranks agree on, the heartbeat, the wish to go on."""

import contextlib
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint.saver import Published, Saver
from pretrain.engine.distributed import Ranks
from pretrain.metric_names import LOSS, TOKENS_PER_SECOND
from pretrain.run.job_records import Heartbeat, JobFolder, Pulse, this_job
from pretrain.run.lease import LOST_FOLDER, Lease, LeaseLost
from pretrain.run.signals import KILL_SWITCH, StopRequest
from pretrain.tracking.metrics import StepMetrics
from pretrain.tracking.recorder import Recorder

LOST = 255
"""Greater than any request: what rank 0 reports when the run folder is no longer its own."""
LOOK_SECONDS = 1.0
"""How often rank 0 looks for the kill switch."""


class Stopped(Exception):
    """The ranks have agreed to stop: what can be done again later is broken off."""


class Life:
    """The same on every rank, but for what rank 0 writes.

    Ranks agree at the edge of each step and of each batch of a validation. A rank that waits for data looks at its own
    signals meanwhile (`requested`), so that no rank waits in the agreement for one that waits for its data.
    """

    def __init__(self, folder: Path, ranks: Ranks, stop: StopRequest, lease: Lease | None, recorder: Recorder) -> None:
        """`lease` is rank 0's."""
        self.request = 0
        """What was agreed on last: a signal, or KILL_SWITCH; 0 for none."""
        self._path = folder
        self._folder = JobFolder(folder)
        self._ranks = ranks
        self._stop = stop
        self._lease = lease
        self._recorder = recorder
        self._looked = -LOOK_SECONDS
        self._switched_off = False
        self._pulse = Pulse(self._folder) if ranks.is_first else None
        self._heartbeat = Heartbeat(0, recorder.attempt)
        self._num_steps = 0
        """Taken by this start; after a rollback the run may stand before its first one."""
        self._lead = float(os.environ.get("DUET_STOP_LEAD") or 0)
        self._edge: float | None = None
        self._longest = 0.0
        self._told_lead = False

    @property
    def requested(self) -> int:
        """What this rank itself knows of."""
        if self._lease and self._lease.lost:
            return LOST
        if self._ranks.is_first and not self._switched_off and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._switched_off = self._folder.kill_switch.exists()
        return KILL_SWITCH if self._switched_off else self._stop.signal

    def agreed_request(self, saver: Saver) -> int:
        """The greatest request that any rank knows of, 0 for none; goes on with the save in flight. A collective.

        Raises:
            LeaseLost: on every rank, when the run folder is no longer ours.
            CheckpointError: on every rank, when one could not write.
        """
        request, writing = self._ranks.largest(self.requested, saver.writing)
        if request == LOST:
            raise LeaseLost(f"{self._path}: {LOST_FOLDER}")
        saver.poll(bool(writing))
        self.request = request
        return request

    def check_in_validation(self, saver: Saver, share: float) -> None:
        """At the edge of its batches, of which this share is done; a collective.

        Raises:
            Stopped: on every rank, when the run is to stop.
        """
        if self.agreed_request(saver):
            raise Stopped
        self._mark_edge()
        if self._heartbeat.validating is None and self._pulse:
            self._pulse.rested()  # that it validates is told at once
        self._heartbeat = replace(self._heartbeat, validating=time.time(), validated=share)
        self._beat()

    def after_validation(self) -> None:
        """It is over, or was broken off."""
        self._heartbeat = replace(self._heartbeat, validating=None, validated=None)
        self._beat()

    def begin(self, step: int) -> None:
        """Training goes on after `step`."""
        self._heartbeat = replace(self._heartbeat, step=step, checkpoint=step or None)
        self._beat()

    def after_step(self, step: int, logged: list[StepMetrics]) -> None:
        """A step is done; `logged` is what was logged after it, if anything was."""
        self._num_steps += 1
        if self._num_steps == 1:
            self._edge = None
        self._mark_edge()
        self._heartbeat = replace(self._heartbeat, step=step, time=time.time())
        if logged:
            values = logged[-1].values
            self._heartbeat = replace(self._heartbeat, loss=values[LOSS], tokens_per_second=values[TOKENS_PER_SECOND])
        self._beat()

    def published(self, checkpoint: Published) -> None:
        """A checkpoint is complete."""
        step, saving = checkpoint.step, checkpoint.seconds
        self._recorder.checkpoint(step, checkpoint.path, checkpoint.blocked)
        self._heartbeat = replace(self._heartbeat, checkpoint=step)
        if self._lead and saving + self._longest > self._lead and not self._told_lead:
            self._told_lead = True
            text = (
                f"the planned signal comes {self._lead:g} s before the time limit, but a save took {saving:.1f} s, and "
                f"the longest step {self._longest:.1f} s: what was not saved yet would be lost; give --signal and "
                f"DUET_STOP_LEAD at least {math.ceil(2 * (saving + self._longest))} s"
            )
            self._recorder.health("lead", step, text, save_seconds=saving, step_seconds=self._longest)

    def ended(self, step: int, request: int) -> None:
        """The loop is over and all is saved; after the planned signal, the job wants to go on."""
        if self._ranks.is_first and request == signal.SIGUSR1 and this_job()[0]:
            self._folder.request_requeue(step, trained=self._num_steps)
        if self._pulse:
            self._pulse.rested()  # the last heartbeat is not left out for speed
        with contextlib.suppress(OSError):  # it is a sign of life only
            self._beat()

    def _beat(self) -> None:
        if not self._pulse:
            return
        with contextlib.suppress(FileNotFoundError):  # removed: not in its place
            self._pulse.beat(self._heartbeat)
        if self._lease and not self._pulse.in_place:
            self._lease.lost = True

    def _mark_edge(self) -> None:
        """What a signal has to wait for; the first step, which compiles, is no measure."""
        now = time.perf_counter()
        if self._edge is not None:
            self._longest = max(self._longest, now - self._edge)
        self._edge = now
