"""MLflow, a mirror of the journal that may be late and never stops training: who brings it up to date, and when.

A thread of rank 0 follows the journal while the run goes on (`Tracker`); `sync` does the same later, from anywhere.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import RunError
from pretrain.journal import Record, read
from pretrain.lease import alive, attempt_path, latest_attempt, read_owner
from pretrain.mirror import JOURNAL, SQLITE, Mirror, State, default_uri

POLL_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Synced:
    """Where a run lies in MLflow, its status there, and how many metric values this call sent."""

    uri: str
    run_id: str
    status: str
    num_metrics: int


def assign(run_dir: Path, *, uri: str | None, experiment: str, run_name: str) -> str:
    """Say where in MLflow a run belongs; one that belongs there already goes on. Makes no call.

    Returns:
        the URI of the store: `uri`, or the sqlite file beside the run folder.

    Raises:
        RunError: `tracking.json` was written by a newer version.
    """
    if uri and uri.startswith(SQLITE):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    state = State(None if uri == default_uri(run_dir) else uri, experiment, run_name)
    before = State.load(run_dir)
    if before and (before.uri, before.experiment) == (state.uri, state.experiment):
        state = before
    state.save(run_dir)
    return state.uri or default_uri(run_dir)


class Tracker:
    """Mirrors a run to MLflow from a daemon thread; the training thread makes no call and waits for none.

    `warn` is called from the thread: once when MLflow fails and once when it is back.

    Raises:
        RunError: the run was not assigned.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._mirror = _mirror(run_dir)
        self._warn = warn
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._complete = False
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)

    def start(self) -> None:
        """Begin to follow the journal."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Send what is left, trying once more at once, for at most `timeout` seconds.

        Returns:
            whether MLflow has all of it; if not, `sync` sends the rest later.
        """
        self._closing.set()
        self._thread.join(timeout)
        self._abandoned.set()
        return self._complete and not self._thread.is_alive()

    def _run(self) -> None:
        uri, pause, failing, described = self._mirror.uri, POLL_SECONDS, False, False
        while True:
            last = self._closing.is_set()
            try:
                self._mirror.ship()
                if last:
                    self._mirror.send_verdict()
                if last or not described:  # after the metrics: a store that refuses files must not hold them up
                    self._mirror.send_files()
                    described = True
            except Exception as error:  # whatever it is, training goes on
                if not failing:
                    self._say(f"MLflow at {uri} failed and is tried again; the journal keeps all: {_brief(error)}")
                pause, failing = min(2 * pause, LONGEST_PAUSE_SECONDS), True
            else:
                if failing:
                    self._say(f"MLflow at {uri} is back and has all")
                pause, failing = POLL_SECONDS, False
            if last:
                self._complete = not failing
                return
            self._closing.wait(pause)

    def _say(self, text: str) -> None:
        if not self._abandoned.is_set():  # the journal and the terminal are gone
            self._warn(text)


def sync(run_dir: Path) -> Synced:
    """Send what MLflow does not have of a run yet, with its files and its status: KILLED when it died without a word.

    The status of a run that goes on is left alone.

    Raises:
        RunError: the run was never tracked, its journal is broken, or MLflow cannot be reached.
    """
    mirror = _mirror(run_dir)
    try:
        mirror.ship()
        attempt = latest_attempt(run_dir)
        if last := _died_without_a_word(run_dir, attempt):
            mirror.set_ended("KILLED", "the process is gone and left no word", last.time)
            if latest_attempt(run_dir) != attempt:  # it has begun in between
                mirror.set_running()
        mirror.send_verdict()
        mirror.send_files()
        return Synced(mirror.uri, mirror.run_id, mirror.status(), mirror.num_metrics)
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"MLflow at {mirror.uri} did not take all of {run_dir}: {_brief(error)}; nothing is lost, try again later"
        ) from error


def _mirror(run_dir: Path) -> Mirror:
    state = State.load(run_dir)
    if state is None:
        raise RunError(
            f"{run_dir}: not a tracked run (no tracking.json); `duet train` makes one unless tracking.mode=off"
        )
    return Mirror(run_dir, state)


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


def _brief(error: Exception) -> str:
    """What went wrong in one line of bounded length; MLflow's own messages fill a page."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
