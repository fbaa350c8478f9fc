"""What a run folder says about its run, and the verdict in two lines of words. Free of torch, mlflow, matplotlib."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal
from data_pipeline.places import RUN, mistaken
from data_pipeline.secret import redact
from pretrain.metric_names import BITS_PER_BYTE, LABEL_SCORES, LOSS, VALIDATION
from pretrain.run.journal import HEALTH, Point, Record, noting, read, series, told_damaged
from pretrain.run.run_listing import run_folders, run_state

OF_SOURCES = (BITS_PER_BYTE.family, VALIDATION.family)
"""What the names of a validation's numbers of one source begin with; the one that is drawn if it is there first."""
_EXPECTED = "expected a run folder, with metrics.jsonl, run.json and config.yaml, as `duet train` makes it"


@dataclass(frozen=True)
class RunData:
    """A run folder as read. `points` holds no superseded ones, `facts` is run.json, `config` is config.yaml's text,
    `state` as `duet runs ls` gives it."""

    path: Path
    facts: dict[str, Any]
    config: str
    state: str
    points: dict[str, list[Point]]
    starts: list[Record]
    end: Record | None
    """How the latest attempt ended; None while it runs, and after a kill that left it no time."""
    samples: list[Record]
    warnings: list[Record]
    """With what the run noticed about itself, and its rollbacks."""
    slowest: list[Record]
    """Each time another rank than before held up the others."""

    @property
    def name(self) -> str:
        """The run's name; the folder's when there is none."""
        return str(self.facts.get("name") or self.path.resolve().name)

    @property
    def last_step(self) -> int:
        """The last step with a metric, 0 if there is none."""
        return max((points[-1].step for points in self.points.values()), default=0)

    @property
    def order0_entropy(self) -> float | None:
        """Bits per byte of the held-out text for a model that knows byte frequencies only."""
        dataset = self.facts.get("dataset")
        value = dataset.get("order0_entropy") if isinstance(dataset, dict) else None
        return float(value) if isinstance(value, int | float) else None

    @property
    def counted(self) -> str:
        """What its losses are means over: `label` where not every token is predicted, so without bits per byte."""
        return "label" if VALIDATION in self.points and BITS_PER_BYTE not in self.points else "token"

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        points = self.points.get(name)
        return points[-1].value if points else None


def load(run_dir: Path) -> RunData:
    """Read a run folder. Only the journal must be there.

    Raises:
        RunError: there is no such folder, no journal in it or nothing in the journal.
    """
    journal = _journal(run_dir)
    kinds: dict[str, list[Record]] = {}
    warnings: list[Record] = []
    damaged: list[str] = []
    last: Record | None = None

    def sorted_out() -> Iterator[Record]:
        """Every record; those that are not metrics are few, and kept."""
        nonlocal last
        for last in noting(read(journal), damaged):
            if last.kind in ("warning", "rollback", *HEALTH):
                warnings.append(last)
            elif last.kind not in ("metrics", "damaged"):
                kinds.setdefault(last.kind, []).append(last)
            yield last

    points = series(sorted_out())
    if last is None:
        raise RunError(f"{journal}: empty; {_EXPECTED}")
    try:
        content = _bytes(run_dir / "run.json")
        facts = json.loads(redact(json.dumps(unseal(content, formats=())))) if content else {}
    except ValueError as error:
        facts = {}
        damaged.append(f"run.json: damaged, and passed over: {error}")
    if damaged:
        warnings.append(Record("damaged", last.time, last.attempt, None, {}, {"text": told_damaged(damaged)}))
    ends = [end for end in kinds.get("end", []) if end.attempt == last.attempt]
    return RunData(
        path=run_dir,
        facts={name: value for name, value in facts.items() if name != "config"},
        config=redact(_bytes(run_dir / "config.yaml").decode(errors="replace")),
        state=run_state(run_dir).state,
        points=points,
        starts=kinds.get("start", []),
        end=ends[-1] if ends else None,
        samples=list({sample.step: sample for sample in kinds.get("sample", [])}.values()),
        warnings=warnings,
        slowest=kinds.get("slowest", []),
    )


def _journal(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such folder; {_EXPECTED}")
    journal = run_dir / "metrics.jsonl"
    if not journal.is_file():
        told = mistaken(run_dir, RUN)
        if run := next(run_folders(run_dir), None):
            why = "; ".join(filter(None, ["a run that has not trained yet", run_state(run).problem]))
            told = why if run == run_dir else f"a folder of runs, such as {run}; name these"
        raise RunError(f"{run_dir}: {told or f'no metrics.jsonl in it; {_EXPECTED}'}")
    return journal


def verdict(run: RunData) -> tuple[str, str]:
    """How the run went: its end and its loss; its validation against what byte frequencies alone would give."""
    loss = run.points.get(LOSS)
    course = "no training step"
    if loss:
        course = f"training loss {loss[0].value:.4f} → {loss[-1].value:.4f} nats per {run.counted}"
    resumed = sum(1 for start in run.starts if start.fields.get("resumed_from") is not None)
    times = "" if not resumed else ", resumed once" if resumed == 1 else f", resumed {resumed} times"
    back = sum(1 for warning in run.warnings if warning.kind == "rollback")
    times += "" if not back else ", rolled back once" if back == 1 else f", rolled back {back} times"
    return f"{_ending(run)} at step {run.last_step:,}{times}: {course}.", _validation(run)


def _ending(run: RunData) -> str:
    if run.end is None:
        return "Still running" if run.state == "running" else "Killed without a word"
    reason = run.end.fields.get("reason") or "no reason given"
    words = {"FINISHED": "Finished", "KILLED": f"Stopped ({reason})", "FAILED": f"Failed ({reason})"}
    status = str(run.end.fields.get("status"))
    return words.get(status, status)


def _validation(run: RunData) -> str:
    bits, order0 = run.last(BITS_PER_BYTE), run.order0_entropy
    if bits is None:
        loss = run.last(VALIDATION)
        if loss is None:
            return "It was never validated."
        return f"Validation: {', '.join(filter(None, [f'{loss:.4f} nats per label', label_scores_told(run)]))}."
    if order0 is None:
        return f"Validation: {bits:.4f} bits per byte."
    said = f"Validation: {bits:.4f} bits per byte"
    if bits < order0:
        return f"{said}, {1 - bits / order0:.0%} below the {order0:.4f} of byte frequencies alone."
    return f"{said}, not below the {order0:.4f} of byte frequencies alone: it has not learned more than those."


def label_scores_told(run: RunData) -> str:
    """How often labels were right at the last validation; nothing of a model that says none."""
    told = {said: run.last(metric) for metric, said in LABEL_SCORES.items()}
    return ", ".join(f"{said} {value:.4f}" for said, value in told.items() if value is not None)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
