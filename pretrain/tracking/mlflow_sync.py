"""A run in MLflow, brought up to date with the run's folder.

The journal is the queue. What the server has said yes to is an offset into each of its files, kept in `tracking.json`
beside a receipt, which is a tag of the run: both come from one call. Where the store has another receipt (it was put
back or made anew), or a file no line's end there (it lost lines), all is compared. To send twice changes nothing.
"""

import shlex
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.places import RUN, mistaken
from data_pipeline.secret import redact
from pretrain.run.journal import Record, is_behind_a_line, read_from
from pretrain.run.run_summary import load, verdict
from pretrain.tracking.mlflow_names import Names, about_start, description, drift_tag, flat, shipped, text
from pretrain.tracking.mlflow_state import JOURNAL, SQLITE, State, default_uri, identity
from pretrain.tracking.mlflow_store import (
    Point,
    Points,
    artifacts,
    as_metrics,
    brief,
    connect,
    find_run,
    is_refused,
    is_slow,
    kind_of_experiment,
    log_dataset,
    point_of,
    wait_longer,
)
from pretrain.tracking.system_metrics import mirrored_files

METRICS_A_CALL = 990
"""MLflow takes 1,000 things a call, and a receipt goes with them."""
ITEMS_A_CALL = 100
"""Params, or tags."""
KEY_TAG, JOURNAL_TAG, FOLDER_TAG, RECEIPT_TAG = "duet.key", "duet.journal", "duet.folder", "duet.receipt"
NAMES_TAG = "duet.names"
"""Which names the metrics of a run have; the first version wrote none."""
NOTE = "mlflow.note.content"
ARTIFACTS = ("config.yaml", "run.json", "code/*", "profile/*", "report.html", "report.png", "report-plots/*")


class Mirror:
    """Brings MLflow up to date in the calling thread. Any call may raise whatever MLflow does; calling again goes on.

    `num_metrics` counts the values sent; `files_due` says that the run's files were not sent yet, or are lost. `warn`
    gets what the user should know.

    Raises:
        RunError: the run was never tracked.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        state = State.load(run_dir, warn)
        if state is None:
            if told := mistaken(run_dir, RUN):
                raise RunError(f"{run_dir}: {told}")
            raise RunError(
                f"{run_dir}: not a tracked run (no tracking.json); `duet train` makes one unless tracking.mode=off"
            )
        self.num_metrics = 0
        self.files_due = True
        self._given = run_dir
        self._run_dir = run_dir.resolve()
        self._warn = warn
        self._state = state
        self._uri = state.uri or default_uri(run_dir)
        self._client: Any = None
        self._failed = False
        self._size = METRICS_A_CALL
        self._refused: set[str] = set()
        self._names = Names()

    @property
    def place(self) -> str:
        """The store, as it may be shown."""
        return redact(self._uri)

    @property
    def run_id(self) -> str:
        """MLflow's name for the run; there is one as soon as something was sent."""
        assert self._state.run_id
        return self._state.run_id

    @property
    def page(self) -> str | None:
        """The address of the run's curves; None while there is no run."""
        return self._state.page(self._run_dir)

    @property
    def called(self) -> str:
        """What a message calls the store."""
        return f"MLflow at {self.place}"

    def bring(self, last: bool) -> None:
        """Send what is new; at the end what became of the run, too."""
        self.ship()
        if last:
            self.send_verdict()
        # After the metrics: a store that refuses files must not hold them up.
        if last or self.files_due:
            self.send_files()

    def wait_longer(self, error: Exception) -> bool:
        """Give MLflow four times as long, if an answer did not come in time; whether that was possible."""
        return is_slow(error) and wait_longer()

    def ship(self) -> None:
        """Send all whole lines that are new: the journal's, then those about the nodes."""
        files = self._files()
        if not self._failed and self._client and all(f.stat().st_size == self._offset(f) for f in files):
            return
        try:
            if self._failed:  # another process may have mended it
                self._state = State.load(self._run_dir) or self._state
            if not self._stands_where_noted() or not all(is_behind_a_line(f, self._offset(f)) for f in files):
                self.compare()
            self._follow(files)
        except Exception:
            self._failed = True
            raise
        self._failed = False

    def want_all_masks(self) -> None:
        """From now on everything is sent that the journal tells of masks; `compare` sends what is there already."""
        self._state.all_masks = True
        self._state.save(self._run_dir)

    def begin_anew(self) -> None:
        """From now on the folder has a run of its own, that no other folder's journal is in."""
        before = self._state
        self._state = State(before.uri, before.experiment, text(self._run_dir.name), before.created, adopt=False)
        self._state.all_masks = before.all_masks
        self._state.save(self._run_dir)

    def compare(self) -> None:
        """Send all that MLflow lacks of the files, whatever is noted.

        One value of a record tells whether its call came through. Of the other names only the newest value is looked
        at; the points of a name are asked for only when that differs.
        """
        run = self._open()
        self.files_due = True
        have = Points(self._client, self.run_id, run.data.metrics)
        newest: dict[str, tuple[Point, float]] = {}
        events: list[Record] = []
        ends: dict[str, int] = {}
        whole = True
        for file, record, behind in self._records():
            ends[file] = behind
            if record.kind in ("start", "checkpoint", "end"):
                events.append(record)
            elif record.kind != "metrics":
                continue
            elif not have.all_of(values := shipped(record, self._names), record):
                whole = False
            else:
                point = point_of(record)
                newest |= {n: (point, v) for n, v in values.items() if n not in newest or newest[n] < (point, v)}
        suspects = {name for name, (_, value) in newest.items() if run.data.metrics.get(name) != value}
        if not whole or suspects:
            self._send_missing(have, suspects)
        self._send([], ends)
        self._tell(events, run)

    def send_files(self) -> None:
        """Send the configuration, where the code came from, and the report, as far as they are there."""
        for pattern in ARTIFACTS:
            for file in sorted(self._run_dir.glob(pattern)):
                folder = file.parent.relative_to(self._run_dir)
                content = file.read_text(errors="replace") if file.suffix in (".yaml", ".json") else ""
                if (shown := redact(content)) != content:  # of a version that let it in
                    self._client.log_text(self.run_id, shown, str(folder / file.name))
                else:
                    self._client.log_artifact(self.run_id, str(file), None if folder == Path() else str(folder))
        self.files_due = False

    def send_verdict(self) -> None:
        """Say how the run went, at the top of its page."""
        run = load(self._run_dir)
        self._client.set_tag(self.run_id, NOTE, description(verdict(run), run.starts[-1] if run.starts else None))

    def status(self) -> str:
        """What MLflow says of the run: RUNNING, FINISHED, FAILED or KILLED."""
        return str(self._client.get_run(self.run_id).info.status)

    def set_running(self) -> None:
        """An attempt has begun."""
        self._client.update_run(self.run_id, status="RUNNING")

    def set_ended(self, status: str, reason: str, time_ms: int) -> None:
        """An attempt has ended: FINISHED, FAILED or KILLED, at `time_ms` milliseconds since the epoch."""
        self._client.set_tag(self.run_id, "end/reason", text(reason))
        self._client.set_terminated(self.run_id, status, time_ms)

    def _files(self) -> list[Path]:
        return [self._run_dir / JOURNAL, *mirrored_files(self._run_dir)]

    def _offset(self, file: Path) -> int:
        return self._state.offsets.get(str(file.relative_to(self._run_dir)), 0)

    def _records(self) -> Iterator[tuple[str, Record, int]]:
        """All records of all files, with the name of the file and the offset behind."""
        for file in self._files():
            for record, behind in read_from(file, 0):
                yield str(file.relative_to(self._run_dir)), record, behind

    def _stands_where_noted(self) -> bool:
        tags = self._open().data.tags
        if self._state.receipt != tags.get(RECEIPT_TAG):  # `duet track sync` may have been faster
            self._state = State.load(self._run_dir) or self._state
        return self._state.receipt is not None and self._state.receipt == tags.get(RECEIPT_TAG)

    def _open(self) -> Any:
        """The run as the server has it now; made when there is none, or none any more."""
        state = self._state
        if original := state.original(self._run_dir):
            raise RunError(
                f"{self._given}: a copy of {original}, whose run in MLflow stays the original's; "
                f"make the copy a run of its own: duet track sync {shlex.quote(str(self._given))} --new-run"
            )
        if self._client is None or self._uri.startswith(SQLITE):  # whose file may be gone
            self._client = connect(self._uri)
        run = find_run(self._client, state.run_id) if state.run_id else None
        if run is None:
            gone = state.run_id
            state.forget_run()
            state.run_id = self._find_run() or self._create_run()
            state.save(self._run_dir)
            self.files_due = True
            if gone:
                self._warn(
                    f"MLflow at {self.place} has no run {gone} any more; the journal is sent as run {state.run_id}"
                )
            run = self._client.get_run(state.run_id)
        if run.info.lifecycle_stage != "active":
            raise RunError(
                f"run {state.run_id} was deleted in MLflow at {self.place}; bring it back with "
                f"MLFLOW_TRACKING_URI={self.place} mlflow runs restore --run-id {state.run_id}, or make it anew with "
                f"duet track sync {shlex.quote(str(self._given))} --new-run"
            )
        self._names = Names(state.all_masks, first=NAMES_TAG not in run.data.tags)
        if state.experiment_id != run.info.experiment_id:
            state.experiment_id = str(run.info.experiment_id)
            state.save(self._run_dir)
        return run

    def _find_run(self) -> str | None:
        tags = {KEY_TAG: self._state.key} | ({JOURNAL_TAG: identity(self._run_dir)} if self._state.adopt else {})
        experiment = self._experiment_id()
        for tag, value in tags.items():
            for run in self._client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{value}'"):
                folder = Path(run.data.tags.get(FOLDER_TAG, self._run_dir))
                if tag == KEY_TAG or not folder.exists() or folder.samefile(self._run_dir):  # else of a copy of it
                    return str(run.info.run_id)
        return None

    def _create_run(self) -> str:
        state = self._state
        tags = {KEY_TAG: state.key, JOURNAL_TAG: identity(self._run_dir), FOLDER_TAG: text(self._run_dir)}
        tags[NAMES_TAG] = "2"
        run = self._client.create_run(
            self._experiment_id(), start_time=state.created, tags=tags, run_name=state.run_name
        )
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._state.experiment
        found = self._client.get_experiment_by_name(name)
        if not found:
            place = artifacts(self._uri).as_uri() if self._uri.startswith(SQLITE) else None  # a server has its own
            try:
                made = str(self._client.create_experiment(name, artifact_location=place))
                kind_of_experiment(self._client, made, {})
                return made
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another run was faster
                if not found:
                    raise
        if found.lifecycle_stage != "active":
            raise RunError(
                f"experiment {name!r} was deleted in MLflow at {self.place}; bring it back with "
                f"MLFLOW_TRACKING_URI={self.place} mlflow experiments restore --experiment-id {found.experiment_id}, "
                "or train with another tracking.experiment"
            )
        kind_of_experiment(self._client, found.experiment_id, found.tags)
        return str(found.experiment_id)

    def _follow(self, files: list[Path]) -> None:
        """Send what is new in the files, and note it call by call; of thousands of nodes many go into one."""
        batch: list[tuple[str, float, Record]] = []
        ends: dict[str, int] = {}
        for file in files:
            name = str(file.relative_to(self._run_dir))
            for record, behind in read_from(file, self._offset(file)):
                values = shipped(record, self._names) if record.kind == "metrics" else {}
                if batch and (len(batch) + len(values) > self._size or (not values and name == JOURNAL)):
                    self._send(batch, ends)
                    batch, ends = [], {}
                batch += [(key, value, record) for key, value in values.items()]
                ends[name] = behind
                if not values and name == JOURNAL:
                    self._send_event(record)
                    self._note(ends, self._state.receipt)
                    ends = {}
        if ends:
            self._send(batch, ends)

    def _send_missing(self, have: Points, suspects: set[str]) -> None:
        """Whole records, and of the others the values of these names."""
        batch: list[tuple[str, float, Record]] = []
        for _, record, _ in self._records():
            if record.kind != "metrics":
                continue
            values = shipped(record, self._names)
            if have.all_of(values, record):
                values = {n: v for n, v in values.items() if n in suspects and not have.one(n, record)}
            batch += [(name, value, record) for name, value in values.items()]
            if len(batch) >= self._size:
                self._send(batch)
                batch = []
        self._send(batch)

    def _send(self, points: list[tuple[str, float, Record]], offsets: dict[str, int] | None = None) -> None:
        """Send points, and note `offsets` when all of them are there, with a receipt in the same call."""
        from mlflow.entities import RunTag

        metrics = as_metrics(points)
        receipt = uuid.uuid4().hex
        size = max(1, min(self._size, METRICS_A_CALL))
        chunks = [metrics[first : first + size] for first in range(0, len(metrics), size)] or [[]]
        for chunk in chunks:
            last = offsets is not None and chunk is chunks[-1]
            self._size = max(1, self._size // 2)  # until it is there: the next try is a smaller one
            self._log("metrics", chunk, [RunTag(RECEIPT_TAG, receipt)] if last else [])
            self._size = min(4 * self._size, METRICS_A_CALL)
        if offsets is not None:
            self._note(offsets, receipt)

    def _log(self, kind: str, items: list[Any], tags: list[Any]) -> None:
        """One call, or as many as it takes to find the thing that MLflow refuses, which is left out."""
        from mlflow.exceptions import MlflowException

        items = [item for item in items if item.key not in self._refused]
        if not items and not tags:
            return
        try:
            self._client.log_batch(self.run_id, **({"tags": tags} | {kind: items}))
            self.num_metrics += len(items) if kind == "metrics" else 0
        except MlflowException as error:
            if not items or not is_refused(error):
                raise
            self._open()  # a deleted run refuses everything
            if len(items) > 1:
                self._log(kind, items[: len(items) // 2], [])
                self._log(kind, items[len(items) // 2 :], tags)
                return
            self._refused.add(items[0].key)
            self._warn(f"MLflow at {self.place} refuses {items[0].key!r}, which is left out there: {brief(error)}")
            self._log(kind, [], tags)

    def _note(self, offsets: dict[str, int], receipt: str | None) -> None:
        self._state.offsets |= offsets
        self._state.receipt = receipt
        self._state.save(self._run_dir)

    def _send_event(self, record: Record) -> None:
        if record.kind == "start":
            self.set_running()
            self._describe(record, self._client.get_run(self.run_id))
            note = description([f"Attempt {record.attempt} is running, or was killed."], record)
            self._client.set_tag(self.run_id, NOTE, note)
            self._state.attempt = record.attempt
        elif record.kind == "checkpoint":
            self._client.set_tag(
                self.run_id, "checkpoint/last", text(f"step {record.step}: {record.fields.get('path')}")
            )
        elif record.kind == "end" and record.attempt >= self._state.attempt:
            self.set_ended(record.fields["status"], str(record.fields.get("reason", "")), record.time)

    def _tell(self, events: list[Record], run: Any) -> None:
        """Send of all events what still holds."""
        starts = [event for event in events if event.kind == "start"]
        checkpoints = [event for event in events if event.kind == "checkpoint"]
        self._state.attempt = starts[-1].attempt if starts else 0
        ends = [event for event in events if event.kind == "end" and event.attempt >= self._state.attempt]
        for start in starts if ends else starts[:-1]:
            self._describe(start, run)
        for event in (*checkpoints[-1:], *(ends[-1:] or starts[-1:])):
            self._send_event(event)
        self._state.save(self._run_dir)

    def _describe(self, start: Record, run: Any) -> None:
        """Send params and tags. MLflow never changes a param: one that differs from an earlier attempt's is a tag."""
        from mlflow.entities import Param, RunTag

        params, there = flat(start.fields.get("config", {})), run.data.params
        tags = about_start(start) | {
            drift_tag(name): text(f"{there[name]} → {value} (attempt {start.attempt})")
            for name, value in params.items()
            if there.get(name, value) != value
        }
        missing = [Param(name, value) for name, value in params.items() if name not in there]
        there |= {param.key: param.value for param in missing}
        for first in range(0, len(missing), ITEMS_A_CALL):
            self._log("params", missing[first : first + ITEMS_A_CALL], [])
        if (fingerprint := start.fields.get("tags", {}).get("dataset/fingerprint")) and "data.path" in params:
            profile = {"vocabulary": params.get("model.vocab_size"), "objective": params.get("data.objective")}
            log_dataset(self._client, self.run_id, params["data.path"], fingerprint, profile)
        new = [RunTag(name, value) for name, value in tags.items()]
        for first in range(0, len(new), ITEMS_A_CALL):
            self._log("tags", new[first : first + ITEMS_A_CALL], [])
