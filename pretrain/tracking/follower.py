"""Mirrors of the journal, which may be late and never stop training: who brings them up to date, and when.

A thread of rank 0 for each follows the journal while the run goes on (`Tracker`): MLflow, TensorBoard, the webhook.
`sync` does the same for MLflow later, from anywhere.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import RunError
from pretrain.run.journal import Record, read, read_from
from pretrain.run.lease import alive, attempt_path, latest_attempt, read_owner
from pretrain.tracking.mlflow_state import JOURNAL, State, default_uri, from_anywhere, state_path
from pretrain.tracking.mlflow_store import TIMEOUT, brief, is_slow, wait_longer
from pretrain.tracking.mlflow_sync import Mirror

POLL_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Synced:
    """Where a run lies in MLflow, its status there, and how many metric values this call sent."""

    uri: str
    run_id: str
    status: str
    num_metrics: int
    page: str
    """Address of its curves."""


def assign(
    run_dir: Path,
    *,
    uri: str | None,
    experiment: str,
    run_name: str,
    all_masks: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> str:
    """Say where in MLflow a run belongs; one that belongs there already goes on. Makes no call.

    Returns:
        the URI of the store: `uri`, or the sqlite file beside the run folder.

    Raises:
        RunError: `tracking.json` was written by a newer version.
    """
    state = State(from_anywhere(run_dir, uri), experiment, run_name)
    before = State.load(run_dir, warn) if state_path(run_dir).exists() else None
    if before and (before.uri, before.experiment) == (state.uri, state.experiment):
        state = before
    if all_masks and not state.all_masks:
        state.all_masks, state.receipt = True, None  # of what was sent, too
    if not state.original(run_dir):
        state.save(run_dir)
    return state.uri or default_uri(run_dir)


def unsent(run_dir: Path) -> str:
    """What MLflow does not have of a run yet, in a few words."""
    state = State.load(run_dir)
    offset = state.offsets.get(JOURNAL, 0) if state else 0
    steps = (r.step for r, _ in read_from(run_dir / JOURNAL, offset) if r.kind == "metrics" and r.step is not None)
    first = next(steps, None)
    return "its end or its files are not there yet" if first is None else f"not there yet: steps from {first} on"


class Follows(Protocol):
    """A mirror of a journal."""

    @property
    def called(self) -> str:
        """What a message calls it."""

    def bring(self, last: bool) -> None:
        """Bring it up to date; `last`: nothing follows. May raise anything; calling it again goes on."""

    def wait_longer(self, error: Exception) -> bool:
        """Give it longer from now on, if this was an answer that did not come in time; whether that was possible."""


class Tracker:
    """Brings a mirror up to date from a daemon thread; the training thread makes no call and waits for none.

    `make` gives the mirror, and gets where that says what the user should know. `warn` is called from the thread: once
    when the mirror fails and once when it is back.

    Raises:
        UserError: as `make` does.
    """

    def __init__(self, make: Callable[[Callable[[str], None]], Follows], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._awake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._mirror = make(self._say)
        self._complete = False
        self._asleep = 0.0
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self, asleep: float = 0.0) -> None:
        """Begin to follow the journal: once `wake` is called, or so many seconds are over."""
        self._asleep = asleep
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        self._awake.set()

    @property
    def called(self) -> str:
        """What a message calls the mirror."""
        return self._mirror.called

    def close_soon(self) -> None:
        """Send what is left, trying once more at once; does not wait for it."""
        self._closing.set()
        self._awake.set()

    def close(self, timeout: float) -> bool:
        """Send what is left, trying once more at once, for at most `timeout` seconds.

        Returns:
            whether the mirror has all of it; if not, `sync` sends MLflow the rest later.
        """
        self.close_soon()
        self._thread.join(timeout)
        self._abandoned.set()
        return self._complete and not self._thread.is_alive()

    def _run(self) -> None:
        self._awake.wait(self._asleep)
        pause, failures, told = POLL_SECONDS, 0, False
        while True:
            last = self._closing.is_set()
            try:
                self._mirror.bring(last)
            except Exception as error:  # whatever it is, training goes on
                failures, pause = failures + 1, min(2 * pause, LONGEST_PAUSE_SECONDS)
                mistake, slow = isinstance(error, RunError), self._mirror.wait_longer(error)
                # Once may be no more than a connection that was closed; what the user has to mend is told at once.
                if not told and (mistake or failures > 1):
                    told = True
                    self._say(f"{self.called} failed and is tried again; the journal keeps all: {brief(error)}")
                if last and not mistake and (slow or failures == 1):
                    continue
            else:
                if told:
                    self._say(f"{self.called} is back and has all")
                pause, failures, told = POLL_SECONDS, 0, False
            if last:
                self._complete = not failures
                return
            self._closing.wait(pause)

    def _say(self, text: str) -> None:
        if not self._abandoned.is_set():  # the journal and the terminal are gone
            self._warn(text)


def sync(
    run_dir: Path, warn: Callable[[str], None] = lambda _: None, new_run: bool = False, all_masks: bool = False
) -> Synced:
    """Send what MLflow does not have of a run, with its files and its status: KILLED when it died without a word.

    The status of a run that goes on is left alone. With `new_run` the folder gets a run of its own in MLflow; with
    `all_masks` everything is sent that the journal tells of masks, from now on.

    Raises:
        RunError: the run was never tracked, its journal is broken, or MLflow cannot be reached.
    """
    mirror = Mirror(run_dir, warn)
    if new_run:
        mirror.begin_anew()
    if all_masks:
        mirror.want_all_masks()
    tries = 0
    while True:
        sent = mirror.num_metrics
        try:
            _bring_up_to_date(mirror, run_dir)
            return Synced(mirror.place, mirror.run_id, mirror.status(), mirror.num_metrics, mirror.page or "")
        except RunError:
            raise
        except Exception as error:
            tries = tries + 1 if mirror.num_metrics == sent else 1
            if tries < 2 and (not is_slow(error) or wait_longer()):
                continue
            hint = f" (or give it more time: {TIMEOUT}=600)" if is_slow(error) else ""
            raise RunError(
                f"MLflow at {mirror.place} did not take all of {run_dir}: {brief(error)}; "
                f"nothing is lost, try again later{hint}"
            ) from error


def _bring_up_to_date(mirror: Mirror, run_dir: Path) -> None:
    mirror.compare()
    attempt = latest_attempt(run_dir)
    if last := _died_without_a_word(run_dir, attempt):
        mirror.set_ended("KILLED", "the process is gone and left no word", last.time)
        if latest_attempt(run_dir) != attempt:  # it has begun in between
            mirror.set_running()
    mirror.send_verdict()
    mirror.send_files()


def _died_without_a_word(run_dir: Path, attempt: int) -> Record | None:
    """The journal's last record, when its newest attempt has no end there and the lease's newest owner is gone."""
    last, started, ended = None, 0, 0
    for last in read(run_dir / JOURNAL):
        if last.kind == "start":
            started = last.attempt
        elif last.kind == "end":
            ended = max(ended, last.attempt)  # a displaced attempt may write its end late
    if started == ended or not attempt:
        return None
    path = attempt_path(run_dir / "attempts", attempt)
    return None if alive(read_owner(path), path) else last
