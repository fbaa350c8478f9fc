"""MLflow, a mirror of the journal that may be late and never stops training. The only file that imports mlflow.

The journal is the queue. What the server has said yes to is an offset into it, kept in `tracking.json`; all else
follows from reading on: runs, tags and the final status, too. Sending a record twice changes nothing.
"""

import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.atomic import write_json
from data_pipeline.errors import ConfigError, RunError
from pretrain.journal import Record, read_from
from pretrain.report_data import load, verdict

FORMAT = 1
POLL_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100
TEXT_LENGTH = 6000
"""Of a param's value; tags may be a little longer."""
SHIPPED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. :-]*(/[A-Za-z0-9_][A-Za-z0-9_. :-]*)?")
"""Names that MLflow accepts, of one section at most: per-layer values would bury the loss on its page."""
KEY_TAG = "duet.key"
ARTIFACTS = ("config.yaml", "run.json", "report.html", "report.png")
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the defaults block a call for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Synced:
    """Where a run lies in MLflow and how many metric values this call sent."""

    uri: str
    run_id: str
    num_metrics: int


@dataclass
class State:
    """`tracking.json`: all that is needed to go on from another process or machine. Holds no secrets."""

    uri: str | None
    """None: the default store beside the run folder, wherever that is now."""
    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    format: int = FORMAT
    created: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """Milliseconds since the epoch."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag that finds the run again when a crash came between its creation and its id reaching the disk."""
    run_id: str | None = None
    pending: bool = True
    """Params and tags of this attempt are still to be sent."""
    offset: int = 0
    """Bytes of the journal that the server has."""


class Tracker:
    """Mirrors a run to MLflow from a daemon thread; the training thread makes no call and waits for none.

    `params` may be nested. `warn` is called from the thread: once when MLflow fails and once when it is back.

    Raises:
        ConfigError: the URI is of no use, or holds a password.
        RunError: `tracking.json` was written by a newer version.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        warn: Callable[[str], None],
    ) -> None:
        self.uri = check_uri(uri)
        stored = None if self.uri == default_uri(run_dir) else self.uri
        state = State(stored, experiment, run_name, _flatten(params), tags)
        before = _load_state(run_dir) if _state_path(run_dir).exists() else None
        if before and (before.uri, before.experiment) == (state.uri, state.experiment):
            state.created, state.key, state.run_id = before.created, before.key, before.run_id
            state.offset = before.offset
        self._mirror = _Mirror(run_dir, state)
        self._mirror.save()
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
        pause, failing = POLL_SECONDS, False
        while True:
            last = self._closing.is_set()
            try:
                self._mirror.ship()
                if last:  # the report is written by now
                    self._mirror.send_files()
            except Exception as error:  # whatever it is, training goes on
                if not failing:
                    self._say(f"MLflow at {self.uri} failed and is tried again; the journal keeps all: {_brief(error)}")
                pause, failing = min(2 * pause, LONGEST_PAUSE_SECONDS), True
            else:
                if failing:
                    self._say(f"MLflow at {self.uri} is back and has all")
                pause, failing = POLL_SECONDS, False
            if last:
                self._complete = not failing
                return
            self._closing.wait(pause)

    def _say(self, text: str) -> None:
        if not self._abandoned.is_set():  # the journal and the terminal are gone
            self._warn(text)


def sync(run_dir: Path) -> Synced:
    """Send what MLflow does not have of a run yet, with its final status and its files.

    Raises:
        RunError: the run was never tracked, its journal is broken, or MLflow cannot be reached.
    """
    mirror = _Mirror(run_dir, _load_state(run_dir))
    try:
        mirror.ship()
        mirror.send_files()
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"MLflow at {mirror.uri} did not take all of {run_dir}: {_brief(error)}; nothing is lost, try again later"
        ) from error
    assert mirror.state.run_id
    return Synced(mirror.uri, mirror.state.run_id, mirror.num_metrics)


def default_uri(run_dir: Path) -> str:
    """The sqlite store `mlflow.db` in the folder of all runs."""
    return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def check_uri(uri: str) -> str:
    """The URI, independent of the working directory.

    Raises:
        ConfigError: it is neither a server's nor that of a sqlite file, or holds a password.
    """
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if "@" in uri:
        raise ConfigError(
            "tracking.uri: a name and password do not belong into a file; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"tracking.uri={uri}: expected http://HOST:PORT, https://HOST or sqlite:///PATH/mlflow.db")
    return uri


class _Mirror:
    """Brings MLflow up to date with the journal, in the calling thread. Any call may raise; calling again goes on."""

    def __init__(self, run_dir: Path, state: State) -> None:
        self.run_dir = run_dir.resolve()
        self.state = state
        self.uri = state.uri or default_uri(run_dir)
        self.num_metrics = 0
        self._client: Any = None

    def save(self) -> None:
        write_json(_state_path(self.run_dir), asdict(self.state))

    def ship(self) -> None:
        """Send all whole lines that are there."""
        if self._client is None:
            self._client = _connect(self.uri)
        if self.state.run_id is None:
            self.state.run_id = self._find_run() or self._create_run()
            self.save()
        if self.state.pending:
            self._describe()
        for records, offset in _batches(self.run_dir / "metrics.jsonl", self.state.offset):
            self._send(records)
            self.state.offset = offset
            self.save()

    def send_files(self) -> None:
        """Send configuration and report, and the verdict as the note on the run's page."""
        run_id = self.state.run_id
        self._client.set_tag(run_id, "mlflow.note.content", "\n\n".join(verdict(load(self.run_dir))))
        for name in ARTIFACTS:
            if (self.run_dir / name).is_file():
                self._client.log_artifact(run_id, str(self.run_dir / name))

    def _find_run(self) -> str | None:
        runs = self._client.search_runs(
            [self._experiment_id()], filter_string=f"tags.`{KEY_TAG}` = '{self.state.key}'", max_results=1
        )
        return runs[0].info.run_id if runs else None

    def _create_run(self) -> str:
        state = self.state
        run = self._client.create_run(
            self._experiment_id(), start_time=state.created, tags={KEY_TAG: state.key}, run_name=state.run_name
        )
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.state.experiment
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        artifacts = _artifacts(self.uri).as_uri() if self.uri.startswith("sqlite") else None  # a server has its own
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)  # another run was faster
            if not found:
                raise
            return str(found.experiment_id)

    def _describe(self) -> None:
        """Send params and tags. MLflow never changes a param: one that differs from an earlier attempt's is a tag."""
        from mlflow.entities import Param, RunTag

        run_id, params, tags = self.state.run_id, self.state.params, dict(self.state.tags)
        there = self._client.get_run(run_id).data.params
        tags |= {
            f"drift/{name}": f"{old} → {params.get(name)}" for name, old in there.items() if old != params.get(name)
        }
        missing = [Param(name, value) for name, value in params.items() if name not in there]
        for chunk in _chunks(missing, PARAMS_A_CALL):
            self._client.log_batch(run_id, params=chunk)
        for chunk in _chunks([RunTag(name, value) for name, value in tags.items()], PARAMS_A_CALL):
            self._client.log_batch(run_id, tags=chunk)
        self.state.pending = False
        self.save()

    def _send(self, records: list[Record]) -> None:
        """Metrics of several records, or one event."""
        from mlflow.entities import Metric

        client, run_id, record = self._client, self.state.run_id, records[0]
        if record.kind == "metrics":
            metrics = [Metric(name, value, r.time, r.step or 0) for r in records for name, value in _shipped(r).items()]
            for chunk in _chunks(metrics, METRICS_A_CALL):
                client.log_batch(run_id, metrics=chunk)
            self.num_metrics += len(metrics)
        elif record.kind == "start":
            client.update_run(run_id, status="RUNNING")
            client.set_tag(run_id, "restarts", str(record.attempt - 1))
            client.set_tag(run_id, "mlflow.note.content", f"Attempt {record.attempt} is running, or was killed.")
        elif record.kind == "checkpoint":
            client.set_tag(run_id, "checkpoint/last", f"step {record.step}: {record.fields.get('path')}")
        elif record.kind == "end":
            client.set_tag(run_id, "end/reason", str(record.fields.get("reason", ""))[:TEXT_LENGTH])
            client.set_terminated(run_id, record.fields["status"], record.time)


def _batches(journal: Path, offset: int) -> Iterator[tuple[list[Record], int]]:
    """Metrics records that fill about one call, or one other record; each with the offset behind."""
    batch: list[Record] = []
    size = 0
    for record, behind in read_from(journal, offset):
        if batch and (record.kind != "metrics" or size + len(record.metrics) > METRICS_A_CALL):
            yield batch, offset
            batch, size = [], 0
        offset = behind
        if record.kind == "metrics":
            batch.append(record)
            size += len(record.metrics)
        else:
            yield [record], offset
    if batch:
        yield batch, offset


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _shipped(record: Record) -> dict[str, float]:
    """What MLflow gets of a record: values that are not finite would ruin its axes, so they are counted instead."""
    named = {name: value for name, value in record.metrics.items() if SHIPPED.fullmatch(name)}
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    if len(finite) < len(named):
        finite["health/nonfinite"] = float(len(named) - len(finite))
    return finite


def _connect(uri: str) -> Any:
    """A client that fails early and says nothing on the terminal."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if uri.startswith("sqlite"):
        _create_store(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri)


def _create_store(path: Path) -> None:
    """Make the database aside and link it into place whole: MLflow's migrations must not run twice or stop half-way."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        SqlAlchemyStore(f"sqlite:///{temporary}", _artifacts(f"sqlite:///{path}").as_uri()).engine.dispose()
        os.link(temporary, path)
    except FileExistsError:
        return  # another run was faster
    finally:
        temporary.unlink(missing_ok=True)


def _artifacts(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"


def _state_path(run_dir: Path) -> Path:
    return run_dir / "tracking.json"


def _load_state(run_dir: Path) -> State:
    path = _state_path(run_dir)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(
            f"{run_dir}: not a tracked run (no tracking.json); `duet train` makes one unless tracking.mode=off"
        ) from error
    if content.get("format") != FORMAT:
        raise RunError(f"{path}: format {content.get('format')} is not known here; this version reads {FORMAT}")
    return State(**content)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:TEXT_LENGTH]
    return flat


def _brief(error: Exception) -> str:
    """What went wrong in one line of bounded length; MLflow's own messages fill a page."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
