"""A run in MLflow, brought up to date with the run's folder. The only file that imports mlflow.

The journal is the queue. What the server has said yes to is an offset into each of its files, kept in `tracking.json`;
all else follows from reading on: params, tags and the final status, too. Sending a record twice changes nothing.
"""

import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipeline.atomic import write_json
from data_pipeline.errors import RunError
from pretrain.journal import Record, read_from
from pretrain.report_data import load, verdict

FORMAT = 2
SQLITE = "sqlite:///"
JOURNAL = "metrics.jsonl"
SYSTEM = "logs/system-*.jsonl"
"""One file a node, each with one writer; a node that joins later brings its own."""
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100
TEXT_LENGTH = 6000
"""Of a param's value; tags may be a little longer."""
SHIPPED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. :-]*(/[A-Za-z0-9_][A-Za-z0-9_. :-]*)?")
"""Names that MLflow accepts, of one section at most: per-layer values would bury the loss on its page."""
A_LAYER = re.compile(r"(gate)/(\w+)/(\w+)/\d+")
A_SOURCE = re.compile(r"(loss/val|loss/val_bits_per_byte)/(.+)", re.DOTALL)
SECTIONS = {"data": "progress", "gate": "mask", "health": "progress", "penalty": "mask"}
"""The run's page sorts its sections by name: so few of them, and none before the loss."""
ATTEMPT = "progress/attempt"
"""Beside every record's points, at the same time and step: tells which of them a rollback superseded."""
NONFINITE = "progress/nonfinite_values"
ILLEGAL = re.compile(r"[^A-Za-z0-9_. :-]")
KEY_TAG = "duet.key"
ARTIFACTS = ("config.yaml", "run.json", "code/*", "profile/*", "report.html", "report.png", "report-plots/*")
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the defaults block a call for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass
class State:
    """`tracking.json`: all that is needed to go on from another process or machine. Holds no secrets."""

    uri: str | None
    """None: the default store beside the run folder, wherever that is now."""
    experiment: str
    run_name: str
    created: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """Milliseconds since the epoch."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag that finds the run again when a crash came between its creation and its id reaching the disk."""
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes that the server has, of each file of metrics, by its path in the run folder."""
    attempt: int = 0
    """The newest that the server knows of: an end that an older one wrote late is not the run's."""

    @classmethod
    def load(cls, run_dir: Path) -> "State | None":
        """What `run_dir` holds; None when the run was never tracked.

        Raises:
            RunError: it was written by a newer version.
        """
        path = _state_path(run_dir)
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        version = content.pop("format", None)
        if version == 1:  # it knew the journal only, and held params and tags, which are in the journal now
            content["offsets"] = {JOURNAL: content.pop("offset")}
            content = {name: value for name, value in content.items() if name not in ("params", "tags", "pending")}
        elif version != FORMAT:
            raise RunError(f"{path}: format {version} is not known here; this version reads {FORMAT}")
        return cls(**content)

    def save(self, run_dir: Path) -> None:
        """Replace the file as a whole."""
        write_json(_state_path(run_dir), {"format": FORMAT} | asdict(self))


class Mirror:
    """Brings MLflow up to date in the calling thread. Any call may raise whatever MLflow does; calling again goes on.

    `num_metrics` counts the values sent.
    """

    def __init__(self, run_dir: Path, state: State) -> None:
        self.uri = state.uri or default_uri(run_dir)
        self.num_metrics = 0
        self._run_dir = run_dir.resolve()
        self._state = state
        self._client: Any = None

    @property
    def run_id(self) -> str:
        """MLflow's name for the run; there is one as soon as something was sent."""
        assert self._state.run_id
        return self._state.run_id

    def ship(self) -> None:
        """Send all whole lines that are there: the journal's, then those about the nodes."""
        if self._client is None:
            self._client = connect(self.uri)
        if self._state.run_id is None:
            self._state.run_id = self._find_run() or self._create_run()
            self._state.save(self._run_dir)
        for file in (self._run_dir / JOURNAL, *sorted(self._run_dir.glob(SYSTEM))):
            name = str(file.relative_to(self._run_dir))
            for records, offset in _batches(file, self._state.offsets.get(name, 0)):
                if records[0].kind == "metrics":
                    self._send_metrics(records)
                elif name == JOURNAL:
                    self._send_event(records[0])
                self._state.offsets[name] = offset
                self._state.save(self._run_dir)

    def send_files(self) -> None:
        """Send the configuration, where the code came from, and the report, as far as they are there."""
        for pattern in ARTIFACTS:
            for file in sorted(self._run_dir.glob(pattern)):
                folder = str(file.parent.relative_to(self._run_dir))
                self._client.log_artifact(self.run_id, str(file), None if folder == "." else folder)

    def send_verdict(self) -> None:
        """Say how the run went, at the top of its page."""
        self._client.set_tag(self.run_id, "mlflow.note.content", "\n\n".join(verdict(load(self._run_dir))))

    def status(self) -> str:
        """What MLflow says of the run: RUNNING, FINISHED, FAILED or KILLED."""
        return str(self._client.get_run(self.run_id).info.status)

    def set_running(self) -> None:
        """An attempt has begun."""
        self._client.update_run(self.run_id, status="RUNNING")

    def set_ended(self, status: str, reason: str, time_ms: int) -> None:
        """An attempt has ended: FINISHED, FAILED or KILLED, at `time_ms` milliseconds since the epoch."""
        self._client.set_tag(self.run_id, "end/reason", reason[:TEXT_LENGTH])
        self._client.set_terminated(self.run_id, status, time_ms)

    def _find_run(self) -> str | None:
        runs = self._client.search_runs(
            [self._experiment_id()], filter_string=f"tags.`{KEY_TAG}` = '{self._state.key}'", max_results=1
        )
        return runs[0].info.run_id if runs else None

    def _create_run(self) -> str:
        state = self._state
        run = self._client.create_run(
            self._experiment_id(), start_time=state.created, tags={KEY_TAG: state.key}, run_name=state.run_name
        )
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._state.experiment
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        artifacts = _artifacts(self.uri).as_uri() if self.uri.startswith(SQLITE) else None  # a server has its own
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)  # another run was faster
            if not found:
                raise
            return str(found.experiment_id)

    def _send_metrics(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, r.time, r.step or 0) for r in records for name, value in shipped(r).items()]
        for chunk in _chunks(metrics, METRICS_A_CALL):
            self._client.log_batch(self.run_id, metrics=chunk)
        self.num_metrics += len(metrics)

    def _send_event(self, record: Record) -> None:
        if record.kind == "start":
            self.set_running()
            self._describe(record)
            self._state.attempt = record.attempt
        elif record.kind == "checkpoint":
            self._client.set_tag(self.run_id, "checkpoint/last", f"step {record.step}: {record.fields.get('path')}")
        elif record.kind == "end" and record.attempt >= self._state.attempt:
            self.set_ended(record.fields["status"], str(record.fields.get("reason", "")), record.time)

    def _describe(self, start: Record) -> None:
        """Send params and tags. MLflow never changes a param: one that differs from an earlier attempt's is a tag."""
        from mlflow.entities import Param, RunTag

        params = _flatten(start.fields.get("config", {}))
        tags = {name: str(value)[:TEXT_LENGTH] for name, value in start.fields.get("tags", {}).items()}
        there = self._client.get_run(self.run_id).data.params
        tags |= {
            f"drift/{name}": f"{there[name]} → {value} (attempt {start.attempt})"[:TEXT_LENGTH]
            for name, value in params.items()
            if there.get(name, value) != value
        }
        tags["restarts"] = str(start.attempt - 1)
        tags["mlflow.note.content"] = f"Attempt {start.attempt} is running, or was killed."
        missing = [Param(name, value) for name, value in params.items() if name not in there]
        for chunk in _chunks(missing, PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=chunk)
        for chunk in _chunks([RunTag(name, value) for name, value in tags.items()], PARAMS_A_CALL):
            self._client.log_batch(self.run_id, tags=chunk)


def shipped(record: Record) -> dict[str, float]:
    """What MLflow gets of a record: values that are not finite would ruin its axes, so they are counted instead."""
    named = {mirrored(name): value for name, value in record.metrics.items() if SHIPPED.fullmatch(name)}
    named |= {mirrored(name): value for name, value in _over_layers(record.metrics)}
    named |= {f"{part[1]}.{ILLEGAL.sub('_', part[2])}": value for part, value in _of_sources(record.metrics)}
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    if len(finite) < len(named):
        finite[NONFINITE] = float(len(named) - len(finite))
    finite[ATTEMPT] = float(record.attempt)
    return finite


def _over_layers(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Least, mean and greatest over the layers, of each site of the masks; nan where one layer's is not finite."""
    sites: dict[str, list[float]] = {}
    for name, value in metrics.items():
        if part := A_LAYER.fullmatch(name):
            sites.setdefault(f"{part[1]}/{part[2]}_{part[3]}", []).append(value)
    for site, values in sites.items():
        finite = all(map(math.isfinite, values))
        for word, summary in (("min", min), ("mean", fmean), ("max", max)):
            yield f"{site}_{word}", summary(values) if finite else math.nan


def _of_sources(metrics: dict[str, float]) -> Iterator[tuple[re.Match[str], float]]:
    for name, value in metrics.items():
        if part := A_SOURCE.fullmatch(name):
            yield part, value


def mirrored(name: str) -> str:
    """A metric's name in MLflow: the journal's, but for its section."""
    section, slash, rest = name.partition("/")
    return SECTIONS.get(section, section) + slash + rest if slash else name


def connect(uri: str) -> Any:
    """A client that fails early and says nothing on the terminal; makes the sqlite file when there is none."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if uri.startswith(SQLITE):
        _create_store(Path(uri.removeprefix(SQLITE)))
    return MlflowClient(tracking_uri=uri)


def default_uri(run_dir: Path) -> str:
    """The sqlite store `mlflow.db` in the folder of all runs."""
    return f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"


def _batches(file: Path, offset: int) -> Iterator[tuple[list[Record], int]]:
    """Metrics records that fill about one call, or one other record; each with the offset behind."""
    batch: list[Record] = []
    size = 0
    for record, behind in read_from(file, offset):
        if batch and (record.kind != "metrics" or size + len(record.metrics) > METRICS_A_CALL):
            yield batch, offset
            batch, size = [], 0
        offset = behind
        if record.kind == "metrics":
            batch.append(record)
            size += len(record.metrics) + 1  # the attempt
        else:
            yield [record], offset
    if batch:
        yield batch, offset


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _create_store(path: Path) -> None:
    """Make the database aside and link it into place whole: MLflow's migrations must not run twice or stop half-way."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        SqlAlchemyStore(f"{SQLITE}{temporary}", _artifacts(f"{SQLITE}{path}").as_uri()).engine.dispose()
        os.link(temporary, path)
    except FileExistsError:
        return  # another run was faster
    finally:
        temporary.unlink(missing_ok=True)


def _artifacts(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).parent / "mlartifacts"


def _state_path(run_dir: Path) -> Path:
    return run_dir / "tracking.json"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        key = prefix + ILLEGAL.sub("_", name)
        if isinstance(value, dict):
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = str(value)[:TEXT_LENGTH]
    return flat
