"""From text to a dataset: at once, or in tasks on many machines."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.building.build_state import remove_work, working_folder
from data_pipeline.building.pipeline import Build, Notes, ignore, make_identity
from data_pipeline.building.publish import mixture, remove_stale
from data_pipeline.building.stages import Context, UnitFacts
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.files.filesystem import is_uri
from data_pipeline.ingest.sources import Unit
from data_pipeline.ingest.splits import Progress, source_names
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import FORMAT, MANIFEST, Manifest, differences
from data_pipeline.tokenize.tokenizer import TOKENIZER, Tokenizer


def build(
    config: DataConfig,
    progress: Progress | None = None,
    overwrite: bool = False,
    processes: int = 1,
    dropped: Path | None = None,
    notes: Notes = ignore,
) -> Manifest:
    """Builds the dataset of `config` at `config.path`, or returns what stands there if it is that very dataset.

    Stages told to `progress`: hash, measure (where something must be known of all text first), tokenizer, train (of
    which no share is known), tokenize, write; `unchanged` if there was nothing to do. The number of processes makes no
    difference to the result. Documents that were left out are listed in the file `dropped`; `notes` is told of files
    that were, or that gave none.

    Interrupted anywhere, it leaves the former state; run again, it goes on behind the last unit that was finished and
    gives the same bytes. One that failed stands in the way of no other settings. (Only while `overwrite` exchanges a
    tokenizer, between two renames, is there no dataset; and between the rename of a first tokenizer and the manifest's
    there is that tokenizer alone, which other settings have to `overwrite`.)

    Raises DataError for unusable text or settings, a full disk, and, unless `overwrite`, for another dataset there.
    """
    root = _root(config)
    with Build.of(config, progress, processes, notes) as job, working_folder(root) as work:
        if (root / MANIFEST).exists() and not overwrite:
            _check_same(root, job.plan.identity)
            if dropped is not None:
                raise _no_list(root)
            job.report("unchanged")(0)
            manifest = _with_mixture(root, Dataset.open(root).manifest, config)
            remove_stale(root, manifest)
            remove_work(work)
            return manifest
        job.plan.begin(work)
        # A dataset that stands there needs its tokenizer until the new one is complete.
        context, _ = job.prepare(work, work if overwrite else _home(root, work))
        job.tokenize(context, job.plan.units)
        return job.publish(context, root, dropped)


@contextmanager
def tokenizer_job(
    config: DataConfig, progress: Progress | None = None, overwrite: bool = False, processes: int = 1
) -> Iterator[tuple[Build, Context, Tokenizer]]:
    """The tokenizer of `config`, in `config.path`, trained unless it stands there; and the job, to look at its text.

    Raises DataError for unusable text or settings, and for another tokenizer there: unless `overwrite`, and always if
    a dataset depends on it.
    """
    root = _root(config)
    with Build.of(config, progress, processes) as job, working_folder(root) as work:
        if overwrite and (root / TOKENIZER).exists():
            if (root / MANIFEST).exists():
                raise DataError(f"the dataset at {root} depends on its tokenizer: `duet data build --overwrite` it")
            shutil.rmtree(root / TOKENIZER)
        job.plan.begin(work)
        yield job, *job.prepare(work, root)
        remove_work(work)


def build_tokenizer(
    config: DataConfig, progress: Progress | None = None, overwrite: bool = False, processes: int = 1
) -> Tokenizer:
    """The tokenizer of `tokenizer_job` alone."""
    with tokenizer_job(config, progress, overwrite, processes) as (_, _, tokenizer):
        return tokenizer


def prepare(config: DataConfig, progress: Progress | None = None, processes: int = 1, notes: Notes = ignore) -> int:
    """The part of `build` that goes before the units: for tasks on many machines. Returns how many units there are.

    Raises DataError as `build` does without `overwrite`."""
    root = _root(config)
    with Build.of(config, progress, processes, notes) as job, working_folder(root) as work:
        _refuse_dataset(root)
        job.plan.begin(work)
        job.prepare(work, _home(root, work))
        job.plan.set_prepared(work)
    return len(job.plan.units)


def build_task(config: DataConfig, task: int, tasks: int, progress: Progress | None = None, processes: int = 1) -> int:
    """Tokenizes each `tasks`-th unit, beginning with number `task`, of what `prepare` prepared. Units that are done are
    not done again. Returns how many are its share.

    Raises DataError if nothing is prepared or the settings are others, and as `build` does."""
    root = _root(config)
    with working_folder(root, shared=True) as work, Build.prepared(config, work, progress, processes) as job:
        context, _ = job.prepare(work, _home(root, work))
        units = job.plan.units[task::tasks]
        job.tokenize(context, units)
        return len(units)


def merge(
    config: DataConfig,
    progress: Progress | None = None,
    processes: int = 1,
    dropped: Path | None = None,
    notes: Notes = ignore,
) -> Manifest:
    """Publishes the dataset once the tasks are done; again after that, it removes what a killed one left, and returns
    the manifest. Raises DataError that names the tasks that are not, and for another dataset there."""
    root = _root(config)
    with working_folder(root) as work:
        if (root / MANIFEST).exists():
            if dropped is not None and not dropped.exists():  # it is written before the dataset is there
                raise _no_list(root)
            return _merged(root, work, config)
        with Build.prepared(config, work, progress, processes, notes) as job:
            context, tokenizer = job.prepare(work, _home(root, work))
            _check_complete(work, job.plan.units, tokenizer)
            return job.publish(context, root, dropped)


def _root(config: DataConfig) -> Path:
    if is_uri(config.path):
        raise DataError(
            f"data.path={config.path} is a URI, and a dataset is built in a folder: build it there, then "
            "`duet data upload` copies it"
        )
    return Path(config.path)


def _home(root: Path, work: Path) -> Path:
    """Where the tokenizer is. One that a build trains for itself is part of its work until it is published: were it
    left behind by a build that fails, it would refuse the settings that mend it."""
    return root if (root / TOKENIZER).exists() else work


def _with_mixture(root: Path, manifest: Manifest, config: DataConfig) -> Manifest:
    """The manifest with the weights that `config` gives, which no shard depends on. Format 1 knows one source only."""
    wanted = manifest.model_copy(update={"format": FORMAT, **mixture(config)})
    if manifest.format == 1 or (wanted.weights, wanted.repeats) == (manifest.weights, manifest.repeats):
        return manifest
    wanted.save(root)
    return wanted


def _check_same(root: Path, identity: dict[str, Any]) -> None:
    if changed := differences(Manifest.load(root).identity, identity):
        raise DataError(
            f"another dataset is at {root}: {'; '.join(changed)}. Choose another data.path, or --overwrite it"
        )


def _check_complete(work: Path, units: list[Unit], tokenizer: Tokenizer) -> None:
    if missing := [unit.number for unit in units if UnitFacts.load(work, unit, tokenizer.sha256) is None]:
        shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
        raise DataError(
            f"{len(missing)} of {len(units)} units are not tokenized yet: {shown}. Unit U is the work of "
            "task U modulo the number of tasks: run `duet data build --task` for those again, then --merge"
        )


def _no_list(root: Path) -> DataError:
    return DataError(f"{root} is built already; what was left out is listed while it is built: --overwrite it")


def _merged(root: Path, work: Path, config: DataConfig) -> Manifest:
    """The dataset there, if it is of these settings. As ever between the tasks, inputs are not read again."""
    manifest = Manifest.load(root)
    inputs = [[(file.path, file.bytes, file.xxh3) for file in source.inputs] for source in manifest.sources]
    same_sources = [source.name for source in manifest.sources] == source_names(config)
    if not same_sources or differences(manifest.identity, make_identity(config, inputs)):
        _refuse_dataset(root)
    remove_stale(root, manifest)
    remove_work(work)
    return manifest


def _refuse_dataset(root: Path) -> None:
    if (root / MANIFEST).exists():
        raise DataError(f"a dataset is at {root} already; choose another data.path")
