"""Where a part runs, and the rows it gives. Standard library only: the runner reads this without torch."""

import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """A number that was measured, and what it must keep to."""

    name: str
    value: float
    limit: float | None = None
    """At most, or `at_least`; None where nothing is claimed."""
    at_least: bool = False
    unit: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """NaN never is, where something is claimed."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Setting:
    """Of a part."""

    device: str
    """`cuda`, or `cpu` for a rehearsal."""
    folder: Path
    """For files of this session, which parts share; it goes with the session."""

    @property
    def tiny(self) -> bool:
        """A rehearsal: all that is done on a GPU, in sizes that a CPU does in seconds."""
        return self.device == "cpu"

    def aim(self, limit: float) -> float | None:
        """A limit on speed, which a rehearsal has none of."""
        return None if self.tiny else limit


Part = Callable[[Setting], Iterator[Row]]


def each(cases: Mapping[str, Callable[[], Iterator[Row]]]) -> Iterator[Row]:
    """The rows of all cases: one that raises costs its own alone, and is a row that failed."""
    for name, rows in cases.items():
        try:
            yield from rows()
        except Exception as error:  # told as a failure; the other cases are wanted, too
            traceback.print_exc()
            yield failed(name, error)


def failed(name: str, error: BaseException) -> Row:
    said = str(error).strip().splitlines() or [""]
    return Row(name, math.nan, 0.0, note=f"{type(error).__name__}: {said[0]}"[:200])


def as_json(row: Row) -> dict[str, Any]:
    return row._asdict() | {"ok": row.ok}
