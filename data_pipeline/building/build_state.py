"""Where a build keeps what is finished until it is published: so that a killed one goes on where it was."""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files.atomic import disk_errors, open_lock, write_atomic
from data_pipeline.files.sealed import unseal, write_sealed
from data_pipeline.ingest.sources import Unit
from data_pipeline.storage.manifest import WORK

_PLAN = "plan.json"
_PREPARED = "prepared"
_LOCK = ".lock"

Inputs = list[list[tuple[str, int, str]]]
"""For each source, (path, bytes, xxh3_64) of each of its files."""


@contextmanager
def working_folder(root: Path, shared: bool = False) -> Iterator[Path]:
    """The folder for work inside `root`, alone, or `shared` with other tasks of the same build.

    Raises DataError if another build is at work there."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = open_lock(root / _LOCK)
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build is at work in {root}; wait for it, or choose another data.path") from None
        work = root / WORK
        with disk_errors(work):
            work.mkdir(exist_ok=True)
        yield work


def remove_work(work: Path) -> None:
    """Ends the build: nothing of it is wanted any more."""
    shutil.rmtree(work)


class BuildPlan:
    """What a build is going to do. Work that was done for another plan is of no use."""

    def __init__(self, identity: dict[str, Any], inputs: Inputs, units: list[Unit]) -> None:
        """`identity`: what the dataset is made from."""
        self.identity = identity
        self.inputs = inputs
        self.units = units

    def begin(self, work: Path) -> None:
        """Keeps what was done for this very plan, and removes what was done for another."""
        there = None
        if (work / _PLAN).exists():
            try:
                there = unseal((work / _PLAN).read_bytes())["work"]
            except (ValueError, LookupError, TypeError) as error:
                print(f"warning: {work / _PLAN} is damaged ({error}): the build begins anew", file=sys.stderr)
        content = {"work": self._work(), "identity": self.identity, "inputs": self.inputs, "units": self.units}
        with disk_errors(work):
            if there != self._work():
                shutil.rmtree(work)
                work.mkdir()
            write_sealed(work / _PLAN, content)

    def _work(self) -> list[Any]:
        """What the results of units depend on: all but the times of their files."""
        parts = [[unit.source, [part[:-1] for part in unit.slices]] for unit in self.units]
        return json.loads(json.dumps([self.identity, parts]))

    @staticmethod
    def set_prepared(work: Path) -> None:
        """Says that all that goes before the units is done."""
        with disk_errors(work):
            write_atomic(work / _PREPARED, "")

    @classmethod
    def load(cls, work: Path) -> "BuildPlan":
        """The plan that was prepared. Raises DataError if there is none."""
        if not (work / _PREPARED).exists():
            raise DataError(
                f"nothing is prepared in {work}: run `duet data build --prepare` with these settings to its end first"
            )
        try:
            content = unseal((work / _PLAN).read_bytes())
            return cls(
                content["identity"],
                [[(path, size, digest) for path, size, digest in files] for files in content["inputs"]],
                [Unit.load(unit) for unit in content["units"]],
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{work / _PLAN} is damaged ({error}); run `duet data build --prepare` again") from None
