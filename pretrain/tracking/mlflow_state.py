"""What a run folder knows of its mirror: `tracking.json`. Free of mlflow.

It may be wrong: damaged, copied with its folder, or older or newer than the store. The run in MLflow decides.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal, write_sealed
from pretrain.run.journal import Record, read

FORMAT = 4
JOURNAL = "metrics.jsonl"
SQLITE = "sqlite:///"
SERVED = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a store."""
ABOUT_TRAINING = "workflowType=machine_learning"
"""Else MLflow takes the reader for one of traces, and leads from the run to an empty page."""
_KEY = re.compile(rb'"key": "([0-9a-f]{32})"')


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
    receipt: str | None = None
    """The run's tag since `offsets` were reached. When it has another, the store is not the one they tell of."""
    folder: str | None = None
    """Where the run folder was: a copy of it has the same key."""
    adopt: bool = True
    """A run in MLflow that was made from this journal is this one, whatever its key."""
    all_masks: bool = False
    """All that the journal tells of masks is sent, and not a few summaries only."""
    experiment_id: str | None = None
    """MLflow's name for the experiment of the run."""

    @classmethod
    def load(cls, run_dir: Path, warn: Callable[[str], None] = lambda _: None) -> "State | None":
        """What `run_dir` holds; made anew from the journal, with a warning, when it is damaged or missing.

        Returns:
            None when the run was never tracked.

        Raises:
            RunError: it was written by a newer version.
        """
        path, content, wrong = state_path(run_dir), b"", "is gone"
        try:
            content = path.read_bytes()
            return _parse(content, path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            wrong = f"is damaged ({type(error).__name__}: {str(error)[:100]})"
        state = _remade(run_dir, content)
        if state:
            warn(f"{path} {wrong}: it is made anew from the journal and from what MLflow has")
        return state

    def save(self, run_dir: Path) -> None:
        """Replace the file as a whole."""
        self.folder = str(run_dir.resolve()).encode("utf-8", "backslashreplace").decode()
        write_sealed(state_path(run_dir), {"format": FORMAT} | asdict(self))

    def forget_run(self) -> None:
        """The run is not in MLflow any more: all of the journal has to be sent."""
        self.run_id, self.receipt, self.offsets, self.attempt = None, None, {}, 0

    def page(self, run_dir: Path) -> str | None:
        """The address of the run's curves in MLflow; where the store is a file, as `mlflow ui` serves it. None while
        the run is not there."""
        if self.run_id is None or self.experiment_id is None:
            return None
        uri = self.uri or default_uri(run_dir)
        server = SERVED if uri.startswith(SQLITE) else uri.rstrip("/")
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics?{ABOUT_TRAINING}"

    def original(self, run_dir: Path) -> Path | None:
        """The folder that `run_dir` is a copy of; None when it is none, or was moved."""
        there = Path(self.folder or run_dir)
        ours, theirs = state_path(run_dir), state_path(there)
        try:
            same = theirs.stat().st_ino == ours.stat().st_ino  # by another way to the same folder
            return there if not same and self.key in theirs.read_text() else None
        except (OSError, ValueError):
            return None


def state_path(run_dir: Path) -> Path:
    """The file of a run's state."""
    return run_dir / "tracking.json"


def identity(run_dir: Path) -> str:
    """Of a journal: a hash of its first line, which says when and how the run began."""
    with open(run_dir / JOURNAL, "rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:32]


def _parse(text: bytes, path: Path) -> State:
    content = unseal(text, formats=(3, FORMAT))
    version = content.pop("format", None)
    if isinstance(version, int) and version > FORMAT:
        raise RunError(f"{path}: format {version} is not known here; this version reads {FORMAT}")
    if version == 1:  # it knew the journal only, and held params and tags, which are in the journal now
        content["offsets"] = {JOURNAL: content.pop("offset")}
        content = {name: value for name, value in content.items() if name not in ("params", "tags", "pending")}
    elif version not in (2, 3, FORMAT):
        raise ValueError(f"format {version}")
    return TypeAdapter(State).validate_json(json.dumps(content), strict=True, extra="forbid")


def _remade(run_dir: Path, damaged: bytes) -> State | None:
    """From the journal, which has the configuration; None when that tells of no tracking."""
    if not (run_dir / JOURNAL).is_file():
        return None
    first: Record | None = None
    config: dict[str, Any] = {}
    for record in read(run_dir / JOURNAL):
        first = first or record
        if record.kind == "start":
            config = record.fields.get("config", {})
    tracking = config.get("tracking", {})
    if first is None or tracking.get("mode", "off") == "off":
        return None
    key = _KEY.search(damaged)
    return State(
        from_anywhere(run_dir, tracking.get("uri")),
        str(tracking.get("experiment")),
        str(config.get("run", {}).get("name")),
        first.time,
        key[1].decode() if key else uuid.uuid4().hex,
        all_masks=tracking.get("masks") == "all",
    )


def from_anywhere(run_dir: Path, uri: str | None) -> str | None:
    """A URI that means the same from everywhere; None for the default store."""
    if uri and uri.startswith(SQLITE):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return None if uri == default_uri(run_dir) else uri


def default_uri(run_dir: Path) -> str:
    """The sqlite store `mlflow.db` in the folder of all runs."""
    return f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"
