"""What the runs of a study came to: kept beside the study as journals, and read from there. Free of torch."""

import gzip
import json
import math
import statistics
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import write_atomic
from model.costs.flops import training_flops_per_token
from model.costs.totals import CostsUnknown
from pretrain.config.architecture import opened
from pretrain.config.schema import Config, differences
from pretrain.metric_names import BITS_PER_BYTE, TOKENS_PER_SECOND, VALIDATION
from pretrain.run.journal import DIVERGED, FORMAT, Point, Record, line_of, read, series
from pretrain.study.spec import Study, StudyRun

JOURNAL = "metrics.jsonl.gz"
CONFIG = "config.yaml"
ROUNDINGS = "roundings.json"
"""What the last checkpoint's validation gives with masks that are rounded otherwise."""
KEPT = ("loss/", "gate/", "penalty/", "data/", "optim/", TOKENS_PER_SECOND)
"""What the names of the metrics that are kept begin with: what was learned, not how the machine fared."""
LEARNED = ("batch.tokens", "data.objective", "model.", "optimizer.", "run.seed", "schedule.", "train.steps")
"""What the names of the settings begin with that decide what is learned; the vocabulary is the dataset's."""


def has_diverged(records: Iterable[Record]) -> bool:
    """Whether a journal ends with a run that diverged."""
    turns = [record for record in records if record.kind in ("start", "end")]
    return bool(turns) and turns[-1].kind == "end" and DIVERGED in str(turns[-1].fields.get("reason"))


def keep(run: StudyRun, folder: Path, *, diverged: bool = False) -> bool:
    """Copy what a finished run says into `folder`, where it may be published: no host, no path. False if there is none.

    Of the steps, the first, every `train.log_every`-th and those with a validation.

    Args:
        diverged: one that has diverged is kept, too.

    Raises:
        RunError: the journal is broken.
    """
    journal, target = run.path / "metrics.jsonl", folder / run.place
    if not journal.is_file():
        return False
    records = list(read(journal))
    finished = any(record.kind == "end" and record.fields.get("status") == "FINISHED" for record in records)
    if not finished and not (diverged and has_diverged(records)):
        return False
    here = f"{Path.cwd()}/"
    every = run.config().train.log_every
    lines = []
    for record in records:
        if record.kind == "metrics":
            assert record.step is not None
            if record.step != 1 and record.step % every and VALIDATION not in record.metrics:
                continue
        elif record.kind not in ("start", "end"):
            continue
        lines.append(_line(record, here))
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / JOURNAL, gzip.compress(b"".join(lines), mtime=0))  # the same bytes each time
    write_atomic(target / CONFIG, (run.path / CONFIG).read_text(encoding="utf-8").replace(here, ""))
    if (run.path / ROUNDINGS).is_file():
        write_atomic(target / ROUNDINGS, (run.path / ROUNDINGS).read_text(encoding="utf-8"))
    return True


def is_kept(run: StudyRun, folder: Path) -> bool:
    """Whether `folder` holds all that a finished run came to.

    Raises:
        RunError: of a run of other settings, or damaged.
    """
    place = folder / run.place
    if not (place / JOURNAL).is_file():
        return False
    config = Config.model_validate(_start(_records(place), place)["config"])
    _check_settings(run, config, place)
    return not config.model.dropout_sites or (place / ROUNDINGS).is_file()


def _line(record: Record, here: str) -> bytes:
    """A record without what depends on the machine or on the folder."""
    content = {"format": FORMAT, "time": record.time, "attempt": record.attempt, "kind": record.kind}
    if record.kind == "metrics":
        finite = {name: value if math.isfinite(value) else str(value) for name, value in record.metrics.items()}
        kept = {name: value for name, value in finite.items() if name.startswith(KEPT)}
        content |= {"step": record.step, "metrics": kept}
    fields = {name: value for name, value in record.fields.items() if name != "host"}
    if record.kind == "end":  # below its first line a reason may name hosts
        fields["reason"] = str(fields.get("reason")).partition("\n")[0]
    if isinstance(fields.get("tags"), dict):
        tags = {name: value for name, value in fields["tags"].items() if name != "host"}
        if str(tags.get("git/commit")).startswith("unknown"):  # and why, which may name a folder
            tags["git/commit"] = "unknown"
        fields["tags"] = tags
    return line_of(json.dumps(content | fields, ensure_ascii=False).replace(here, ""))


@dataclass(frozen=True)
class Result:
    """One finished run."""

    run: StudyRun
    points: dict[str, list[Point]]
    config: Config
    parameters: int
    roundings: dict[str, dict[str, float]]
    """By rounding, the metrics of a validation; empty without masks."""
    diverged: bool = False

    @property
    def metric(self) -> str:
        """Of the validation loss, in the study's unit."""
        return VALIDATION if self.run.study.sections[self.run.section].unit == "nats per token" else BITS_PER_BYTE

    @property
    def loss(self) -> float:
        """Validation loss after the last step; infinite of a run that has diverged."""
        last = math.inf if self.diverged else self.points[self.metric][-1].value
        return last if math.isfinite(last) else math.inf

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole training: matrix products, as `duet model flops` counts them; None where an architecture
        of one's own does not say, and cannot be measured."""
        tokens = self.config.batch.tokens * self.config.train.steps
        try:
            return training_flops_per_token(self.config.model, self.config.objective.of_pairs) * tokens
        except CostsUnknown:
            return None

    @property
    def speed(self) -> float:
        """Tokens a second, median over the run."""
        return statistics.median(point.value for point in self.points[TOKENS_PER_SECOND])

    def at(self, name: str, step: int | None = None) -> float | None:
        """A metric's value at a step or the first one recorded after it; the last value unless given."""
        points = self.points.get(name)
        if not points:
            return None
        return points[-1].value if step is None else next((p.value for p in points if p.step >= step), None)


@dataclass(frozen=True)
class Results:
    """All finished runs of a study that were kept in `folder`."""

    study: Study
    folder: Path

    @cached_property
    def _all(self) -> dict[str, Result]:
        runs = self.study.runs(list(self.study.sections))
        return {run.place: _read(run, self.folder) for run in runs if (self.folder / run.place / JOURNAL).is_file()}

    def of(self, section: str, arm: str, setting: str | None = None) -> list[Result]:
        """Those of one arm, by seed."""
        found = (r for r in self._all.values() if (r.run.section, r.run.arm, r.run.setting) == (section, arm, setting))
        return sorted(found, key=lambda result: result.run.seed)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean of the values."""
    return statistics.fmean(values)


def _read(run: StudyRun, folder: Path) -> Result:
    place = folder / run.place
    records = _records(place)
    start = _start(records, place)
    config = Config.model_validate(start["config"])
    _check_settings(run, config, place)
    roundings = place / ROUNDINGS
    return Result(
        run=run,
        points=series(records),
        config=opened(config, run.path),
        parameters=start["parameters"],
        roundings=json.loads(roundings.read_text()) if roundings.is_file() else {},
        diverged=has_diverged(records),
    )


def _records(place: Path) -> list[Record]:
    """Of the journal that was kept there. Raises RunError where it is damaged."""
    with tempfile.TemporaryFile() as unpacked:  # without a name, so that nothing is left behind by a kill
        try:
            unpacked.write(gzip.decompress((place / JOURNAL).read_bytes()))
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"{place / JOURNAL}: cannot be unpacked: {error}; collect it again from its run") from error
        unpacked.flush()
        return list(read(Path(f"/proc/self/fd/{unpacked.fileno()}")))


def _start(records: list[Record], place: Path) -> dict[str, Any]:
    """What the run's beginning says: configuration, parameters. Raises RunError where it is not there."""
    for record in records:
        if record.kind == "start" and "config" in record.fields:
            return record.fields
    raise RunError(f"{place / JOURNAL}: its beginning is damaged; collect it again from its run")


def _check_settings(run: StudyRun, config: Config, place: Path) -> None:
    """Raises RunError where the run that was kept in `place` learned by other settings than the study has now."""
    changed = [
        f"{key}: {kept} in the run, {now} in the study"
        for key, (kept, now) in differences(config, run.config()).items()
        if key.startswith(LEARNED) and key != "model.vocab_size"
    ]
    if changed:
        raise RunError(f"{place}: kept of a run of other settings: {'; '.join(changed)}; remove it, and train it again")
