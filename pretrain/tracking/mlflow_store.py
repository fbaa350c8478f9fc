"""The way to MLflow: a client that fails early, the sqlite store, and what MLflow's errors mean."""

import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import starmap
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files.atomic import check_writable
from data_pipeline.secret import redact
from pretrain.run.journal import Record
from pretrain.tracking.mlflow_state import SQLITE

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
LONGEST_CALL_SECONDS = 320
KIND = "mlflow.experimentKind"
DIGEST, DATASET_NAME = 36, 500
"""The most characters that MLflow takes."""
Point = tuple[int, int]
"""Step and time."""
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default blocks a call for four minutes; who calls tries again
    TIMEOUT: "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # a file that was put in another's place is seen
}


def connect(uri: str) -> Any:
    """A client that fails early and says nothing on the terminal; makes the sqlite file when there is none."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what it logs as an error it raises, too
    if uri.startswith(SQLITE):
        _create_store(Path(uri.removeprefix(SQLITE)))
    return MlflowClient(tracking_uri=uri)


def artifacts(uri: str) -> Path:
    """Where the files of a sqlite store's runs are."""
    return Path(uri.removeprefix(SQLITE)).parent / "mlartifacts"


def is_gone(error: Exception) -> bool:
    """Whether MLflow itself says that there is no such run, and not something on the way to it."""
    from mlflow.exceptions import MlflowException, RestException

    if not isinstance(error, MlflowException) or error.error_code != "RESOURCE_DOES_NOT_EXIST":
        return False
    return isinstance(error, RestException) or "Response body" not in str(error)


def find_run(client: Any, run_id: str) -> Any:
    """The run; None when MLflow says that there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if not is_gone(error):
            raise
        return None


def is_refused(error: Exception) -> bool:
    """Whether MLflow will never take what it was given."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def is_slow(error: Exception) -> bool:
    """Whether an answer did not come in time."""
    return any(word in str(error).lower() for word in ("timed out", "timeout"))


def wait_longer() -> bool:
    """Give MLflow four times as long for its next answers; whether that was possible."""
    seconds = int(os.environ.get(TIMEOUT, ENVIRONMENT[TIMEOUT]))
    os.environ[TIMEOUT] = str(max(seconds, min(4 * seconds, LONGEST_CALL_SECONDS)))
    return seconds < LONGEST_CALL_SECONDS


def brief(error: Exception) -> str:
    """What went wrong in one line; of bounded length, since MLflow's own messages fill a page."""
    if isinstance(error, UserError):
        return str(error)
    lines = redact(str(error)).strip().splitlines() or [""]
    damaged = any(words in lines[0] for words in ("disk image is malformed", "file is not a database"))
    way_on = "; move the file away, and it is made anew from the journals" if damaged else ""
    return f"{type(error).__name__}: {lines[0][:300]}{way_on}"


def kind_of_experiment(client: Any, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Say that an experiment is about training, unless its tags say what it is about: else MLflow guesses, and shows a
    page about traces."""
    if KIND not in tags:
        client.set_experiment_tag(experiment_id, KIND, "custom_model_development")


def log_dataset(client: Any, run_id: str, path: str, fingerprint: str, profile: Mapping[str, Any]) -> None:
    """Say what a run was trained on; saying it twice changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=Path(path).name[:DATASET_NAME] or "data",
        digest=fingerprint[:DIGEST],
        source_type="uri" if "://" in path else "local",
        source=json.dumps({"uri": redact(path)}),
        profile=json.dumps(dict(profile)),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


class Points:
    """The points that MLflow has of a run; those of a name are fetched when it is asked for."""

    def __init__(self, client: Any, run_id: str, newest: dict[str, float]) -> None:
        """`newest`: the last value of each name."""
        self._client = client
        self._run_id = run_id
        self._newest = newest
        self._points: dict[str, set[Point]] = {}

    def one(self, name: str, record: Record) -> bool:
        """Whether a record's value of this name is there."""
        if name not in self._points:
            history = self._client.get_metric_history(self._run_id, name) if name in self._newest else []
            self._points[name] = {(metric.step, metric.timestamp) for metric in history}
        return point_of(record) in self._points[name]

    def all_of(self, values: dict[str, float], record: Record) -> bool:
        """Whether a record is there: its values came in order, so the last of those that MLflow has tells of all."""
        last = next((name for name in reversed(values) if name in self._newest), None)
        return last is not None and self.one(last, record)


def as_metrics(points: Iterable[tuple[str, float, Record]]) -> list[Any]:
    """As MLflow takes them, each once: when a point is twice in a call, its sqlite store looks for every one."""
    from mlflow.entities import Metric

    distinct = dict.fromkeys((name, value, record.time, record.step or 0) for name, value, record in points)
    return list(starmap(Metric, distinct))


def point_of(record: Record) -> Point:
    """Step and time of a record."""
    return record.step or 0, record.time


def _create_store(path: Path) -> None:
    """Make the database aside and link it into place whole: MLflow's migrations must not run twice or stop half-way."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if path.exists():
        if _is_empty(path):  # made by a program that looked for tables, or cut off
            SqlAlchemyStore(f"{SQLITE}{path}", artifacts(f"{SQLITE}{path}").as_uri()).engine.dispose()
        return
    check_writable(path)  # MLflow would try for a minute, and then not say why
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        SqlAlchemyStore(f"{SQLITE}{temporary}", artifacts(f"{SQLITE}{path}").as_uri()).engine.dispose()
        os.link(temporary, path)
    except FileExistsError:
        return  # another run was faster
    finally:
        temporary.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as database:
        [number] = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return not number
