"""TensorBoard, a mirror of the journal in files: `tensorboard --logdir` reads the folder.

Each process begins an event file of its own, with the step from which on it replaces what older ones say: TensorBoard
then passes over that. How far the journal is mirrored is noted in `mirrored.json`, behind what was written, so a crash
in between costs nothing.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.files.atomic import disk_errors, write_atomic
from pretrain.run.journal import Record, is_behind_a_line, read_from
from pretrain.tracking.mlflow_names import Names, shipped
from pretrain.tracking.system_metrics import mirrored_files

FOLDER = "tensorboard"
NOTES = "mirrored.json"
EVENTS = "events.out.tfevents.*"
LIBRARY = "tensorboard"


def check_installed(by: str) -> None:
    """Raises ConfigError, which names the option `by` that asks for it, without the library."""
    if find_spec(LIBRARY) is None:
        raise ConfigError(f"{by} needs the library {LIBRARY}: pip install 'duet-pretrain[tensorboard]'")


class EventFiles:
    """Mirrors a run into `folder`, and what each node's sampler says into a folder of its own in it.

    Goes on where the notes in the folder say; with `anew` it begins from nothing.
    """

    def __init__(self, run_dir: Path, folder: Path | None = None, *, all_masks: bool = False, anew: bool = False):
        self._run_dir = run_dir
        self._folder = folder or run_dir / FOLDER
        self._names = Names(all_masks)
        self._writers: dict[Path, _Writer] = {}
        self._offsets: dict[str, int] = {}
        self.num_points = 0
        if anew:
            for file in [*self._folder.glob(EVENTS), *self._folder.glob(f"*/{EVENTS}"), self._folder / NOTES]:
                file.unlink(missing_ok=True)
        with suppress(FileNotFoundError, ValueError):
            noted = json.loads((self._folder / NOTES).read_bytes())
            # Lost or damaged, as are lines of the journal: all is written anew, and replaces what is there.
            if isinstance(noted, dict) and all(isinstance(v, int) and v >= 0 for v in noted.values()):
                self._offsets = {name: v for name, v in noted.items() if is_behind_a_line(run_dir / name, v)}

    @property
    def called(self) -> str:
        """What a message calls it."""
        return f"TensorBoard's folder {self._folder}"

    def bring(self, last: bool) -> None:
        """Write what is new in the journal and in the nodes' files. Raises OSError; calling it again goes on."""
        del last
        offsets = dict(self._offsets)
        try:
            for file, folder in self._files():
                self._follow(file, folder, offsets)
            for writer in self._writers.values():
                writer.flush()
        except OSError:
            self._writers.clear()  # what is half written is replaced by the next file
            raise
        if offsets != self._offsets:
            write_atomic(self._folder / NOTES, json.dumps(offsets))
            self._offsets = offsets

    def wait_longer(self, error: Exception) -> bool:
        """A file system is not asked to be quicker."""
        del error
        return False

    def _files(self) -> Iterator[tuple[Path, Path]]:
        """Each file of metrics, and the folder it is mirrored to."""
        yield self._run_dir / "metrics.jsonl", self._folder
        for file in mirrored_files(self._run_dir):
            yield file, self._folder / file.stem.removeprefix("system-")

    def _follow(self, file: Path, folder: Path, offsets: dict[str, int]) -> None:
        name = str(file.relative_to(self._run_dir))
        for record, behind in read_from(file, offsets.get(name, 0)):
            if record.kind in ("start", "rollback"):
                self._writer(folder).supersede((record.fields.get("resumed_from") or 0) + 1, record.time)
                if config := record.fields.get("config"):
                    self._writer(folder).text("config", json.dumps(config, indent=1), 0, record.time, fenced=True)
            elif record.kind == "sample":
                self._writer(folder).text("sample", str(record.fields.get("text")), record.step or 0, record.time)
            elif record.kind == "metrics":
                self._write(folder, record)
            offsets[name] = behind

    def _write(self, folder: Path, record: Record) -> None:
        values = shipped(record, self._names)
        del values[self._names.attempt]  # what is superseded is not shown
        if values:
            fresh, step = folder not in self._writers, record.step or 0
            writer = self._writer(folder)
            if fresh or (folder != self._folder and step < writer.step):  # a node's file has no starts
                writer.supersede(step, record.time)
            writer.step = step
            writer.scalars(values, step, record.time)
            self.num_points += len(values)

    def _writer(self, folder: Path) -> "_Writer":
        if folder not in self._writers:
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[folder] = _Writer(folder)
        return self._writers[folder]


class _Writer:
    """One event file. Times are in milliseconds since the epoch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        now = time.time()
        # TensorBoard reads them in the order of their names: behind what a clock that was ahead has made, too.
        made = (re.search(r"tfevents\.(\d+)", file.name) for file in folder.glob(EVENTS))
        stamp = max([int(now), *(int(found[1]) + 1 for found in made if found)])
        path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{time.time_ns()}.{os.getpid()}"
        self.step = 0
        """The last one that was written."""
        self._records = RecordWriter(open(path, "xb"))  # noqa: SIM115 - for the life of the mirror
        self._write(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))

    def supersede(self, step: int, moment: int) -> None:
        """What older files, and this one so far, say of this step and later ones does not count any more."""
        log = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(self._event.Event(wall_time=moment / 1e3, step=step, session_log=log))

    def scalars(self, values: dict[str, float], step: int, moment: int) -> None:
        """A step's metrics."""
        kind = self._summary.Summary
        summary = kind(value=[kind.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(self._event.Event(wall_time=moment / 1e3, step=step, summary=summary))

    def text(self, tag: str, text: str, step: int, moment: int, *, fenced: bool = False) -> None:
        """A text; TensorBoard reads it as Markdown, and `fenced` as it is."""
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shown = "\n".join(f"    {line}" for line in text.splitlines()) if fenced else text
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        tensor = TensorProto(dtype=DT_STRING, string_val=[shown.encode("utf-8", "backslashreplace")])
        value = self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        summary = self._summary.Summary(value=[value])
        self._write(self._event.Event(wall_time=moment / 1e3, step=step, summary=summary))

    def flush(self) -> None:
        """To the file."""
        self._records.flush()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def export(run_dir: Path, folder: Path, told: Callable[[str], None]) -> None:
    """Write all of a run, every mask included, into a folder, in place of what TensorBoard files it holds.

    Raises:
        RunError: not a run folder; the folder cannot be written.
        ConfigError: the library is missing.
    """
    check_installed("--to tensorboard")
    with disk_errors(folder, RunError):
        files = EventFiles(run_dir, folder, all_masks=True, anew=True)
        files.bring(last=True)
    told(f"{folder}: {files.num_points:,} values of {run_dir}; tensorboard --logdir {folder} shows them")
