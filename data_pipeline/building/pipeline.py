"""The steps of a build, each a stage over all units: hash, look at the documents, sample, tokenize, write shards."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.building.build_state import BuildPlan, Inputs, remove_work
from data_pipeline.building.dataset_tokenizer import prepare_tokenizer, tokenizer_identity
from data_pipeline.building.process_pool import Advance, Crew, available_cpus
from data_pipeline.building.publish import describe, files_without_documents, list_dropped, publish
from data_pipeline.building.shard_assembly import forget_files, plan_assembly, write_shard
from data_pipeline.building.stages import (
    Context,
    UnitFacts,
    hash_files,
    load_array,
    look_at,
    looked_file,
    sample_text,
    save_arrays,
    tokenize,
    verdicts_file,
)
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.errors import DataError
from data_pipeline.files.formats import kind
from data_pipeline.ingest.duplicates import best_bands, copies
from data_pipeline.ingest.filters import filter_identity
from data_pipeline.ingest.sources import CUT_RULE, Unit, named
from data_pipeline.ingest.splits import REASONS, Corpus, Progress, source_config, source_names
from data_pipeline.storage.manifest import Manifest, differences
from data_pipeline.tokenize.tokenizer import TOKENIZER, Reservoir, Segment, Tokenizer

_MAX_THREADS = 16

Notes = Callable[[str], None]
"""Told, in a line each, what a person should know of the inputs."""


def ignore(note: str) -> None:
    """For callers whom no note concerns."""


def make_identity(config: DataConfig, inputs: Inputs) -> dict[str, Any]:
    """What the dataset is made from. Content only: moving the files or the dataset changes nothing. Settings that came
    later are in it as in tokenizer_identity."""
    first = {"rule", "fraction", "text_key"}
    identity: dict[str, Any] = {
        "tokenizer": tokenizer_identity(config.tokenizer),
        "split": {
            **config.split.model_dump(include=first),
            **config.split.model_dump(exclude={"files", "prefix", *first}, exclude_defaults=True),
        },
        "errors": config.errors,
        "seed": config.seed,
        "cut": CUT_RULE,
        "shard_tokens": config.shard_tokens,
        **config.model_dump(include={"duplicates", "shuffle"}, exclude_defaults=True),
        **({"chat_template": config.chat_template} if config.chat else {}),
        **({"labels": config.labels.model_dump()} if config.labelled else {}),
        "sources": {},
    }
    for name, files in zip(source_names(config), inputs, strict=True):
        source = source_config(config, name)
        kept = filter_identity(source.filter, f"data.sources.{name}.filter")
        later = {"target_key", "messages_key", "prefix", "label_key", "question_key"}
        identity["sources"][name] = {
            "text_key": source.text_key,
            **source.model_dump(include=later, exclude_defaults=True),
            **({"filter": kept} if kept else {}),
            "inputs (xxh3)": [f"{kind(path)} {digest}" for path, _, digest in files],
        }
    return identity


class Build:
    """A build: its plan, and the crew that carries it out, which is dismissed at the end of a `with`."""

    def __init__(
        self, config: DataConfig, plan: BuildPlan, progress: Progress | None, processes: int, notes: Notes = ignore
    ) -> None:
        self.plan = plan
        self._notes = notes
        self._config = config
        self._progress = progress
        self._crew = Crew(processes)

    def __enter__(self) -> "Build":
        return self

    def __exit__(self, *exception: object) -> None:
        self._crew.dismiss()

    @classmethod
    def of(cls, config: DataConfig, progress: Progress | None, processes: int, notes: Notes = ignore) -> "Build":
        """Finds the inputs and hashes them."""
        corpus = Corpus(config)
        for source in corpus.sources:
            if source.left_out:
                notes(named("left out", source.name, source.left_out))
        units = corpus.units()
        job = cls(config, BuildPlan({}, [], units), progress, processes, notes)
        job._crew.expect(len(units))
        parts = [part for source in corpus.sources for part in source.parts()]
        advance = job.report("hash", corpus.input_bytes)
        hashed = iter(list(itertools.chain.from_iterable(job._crew.run(hash_files, parts, advance))))
        inputs = [list(itertools.islice(hashed, len(source.files))) for source in corpus.sources]
        job.plan = BuildPlan(make_identity(config, inputs), inputs, units)
        return job

    @classmethod
    def prepared(
        cls, config: DataConfig, work: Path, progress: Progress | None, processes: int, notes: Notes = ignore
    ) -> "Build":
        """What `prepare` left. Raises DataError if there is nothing, or it was for other settings."""
        plan = BuildPlan.load(work)
        if changed := differences(plan.identity, make_identity(config, plan.inputs)):
            raise DataError(f"{work} was prepared for other settings: {'; '.join(changed)}. Prepare it again")
        return cls(config, plan, progress, processes, notes)

    def report(self, stage: str, total: int = 0, done: int = 0) -> Advance:
        """What tells the progress of a stage."""

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if self._progress is not None:
                self._progress(stage, min(done, total), total)

        return advance

    def prepare(self, work: Path, home: Path) -> tuple[Context, Tokenizer]:
        """All that must be known before a unit can be tokenized; what is there already is not done again."""
        config = self._config
        context = Context(config, work)
        if _looks(config):
            self._look(context)
            context = replace(context, verdicts=True, train_bytes=self._train_bytes(work))
        identity = {key: value for key, value in self.plan.identity.items() if key not in ("shard_tokens", "shuffle")}
        texts = functools.partial(self._sample, context)
        tokenizer = prepare_tokenizer(home, work, config.tokenizer, config.seed, identity, texts)
        processes = max(1, min(self._crew.size, len(self.plan.units)))
        threads = max(1, min(available_cpus() // processes, _MAX_THREADS))
        return replace(context, tokenizer=home / TOKENIZER, threads=threads), tokenizer

    def _look(self, context: Context) -> None:
        work, units = context.work, self.plan.units
        if all(verdicts_file(work, unit).exists() for unit in units):
            return
        todo = [unit for unit in units if not looked_file(work, unit).exists()]
        for _ in self._crew.run(functools.partial(look_at, context), todo, self._report_units("measure", todo)):
            pass
        files = [looked_file(work, unit) for unit in units]
        parts = [load_array(file, "verdicts") for file in files]
        verdicts = np.concatenate(parts)
        rule = self._config.duplicates
        if rule.rule != "keep":
            again = copies([load_array(file, "digests") for file in files], verdicts == 0)
            verdicts[again] = REASONS.index("duplicate")
        if rule.rule == "near":
            near = np.zeros(len(verdicts), bool)
            for band in range(best_bands(rule.threshold, rule.permutations)[0]):
                near |= copies([load_array(file, "near")[:, band : band + 1] for file in files], verdicts == 0)
            verdicts[near] = REASONS.index("near duplicate")
        ends = np.cumsum([len(part) for part in parts])
        for unit, decided in zip(units, np.split(verdicts, ends[:-1]), strict=True):
            save_arrays(verdicts_file(work, unit), {"verdicts": decided})

    def _train_bytes(self, work: Path) -> tuple[int, ...]:
        if self._config.split.rule != "tail":
            return ()
        sizes = []
        for unit in self.plan.units:
            stays = load_array(verdicts_file(work, unit), "verdicts") == 0
            sizes.append(int(load_array(looked_file(work, unit), "bytes")[stays].sum()))
        totals: Counter[str] = Counter()
        for unit, size in zip(self.plan.units, sizes, strict=True):
            totals[unit.source] += size
        share, before = 1 - Fraction(str(self._config.split.fraction)), Counter[str]()
        budgets = []
        for unit, size in zip(self.plan.units, sizes, strict=True):
            budgets.append(max(int(totals[unit.source] * share) - before[unit.source], 0))
            before[unit.source] += size
        return tuple(budgets)

    def _sample(self, context: Context) -> list[str]:
        limit = self._config.tokenizer.sample_bytes
        reservoir = Reservoir(limit, self._config.seed)
        for _, segments in self._sample_units(context, "tokenizer", limit):
            for segment in segments:
                reservoir.add(segment)
        texts = [segment.text for segment in reservoir.segments()]
        self.report("train", sum(len(text.encode()) for text in texts))(0)
        return texts

    def sample_sources(self, context: Context, limit: int) -> dict[str, list[str]]:
        """For each source a sample of its training text, of at most `limit` bytes."""
        reservoirs = {name: Reservoir(limit, self._config.seed) for name in source_names(self._config)}
        for unit, segments in self._sample_units(context, "measure", limit):
            for segment in segments:
                reservoirs[unit.source].add(segment)
        return {name: [segment.text for segment in found.segments()] for name, found in reservoirs.items()}

    def _sample_units(self, context: Context, stage: str, limit: int) -> Iterator[tuple[Unit, list[Segment]]]:
        units = self.plan.units
        advance = self._report_units(stage, units)
        return zip(units, self._crew.run(functools.partial(sample_text, context, limit), units, advance), strict=True)

    def _report_units(self, stage: str, todo: list[Unit]) -> Advance:
        """Progress over all units, of which those not in `todo` are done."""
        total = sum(unit.bytes for unit in self.plan.units)
        advance = self.report(stage, total, total - sum(unit.bytes for unit in todo))
        advance(0)
        return advance

    def tokenize(self, context: Context, units: list[Unit]) -> None:
        """Tokenizes those of the units that are not done."""
        assert context.tokenizer is not None
        sha256 = Tokenizer.of(context.tokenizer).sha256
        todo = [unit for unit in units if UnitFacts.load(context.work, unit, sha256) is None]
        todo.sort(key=lambda unit: -unit.bytes)  # Small ones last, so that all processes end at about the same time.
        for _ in self._crew.run(functools.partial(tokenize, context), todo, self._report_units("tokenize", todo)):
            pass

    def publish(self, context: Context, root: Path, dropped: Path | None) -> Manifest:
        """Writes the shards and the manifest, once all units are done."""
        assert context.tokenizer is not None
        tokenizer = Tokenizer.of(context.tokenizer)
        units = self.plan.units
        facts = [UnitFacts.load(context.work, unit, tokenizer.sha256) for unit in units]
        complete = [done for done in facts if done is not None]
        assert len(complete) == len(units)
        if dropped is not None:
            list_dropped(context.work, units, complete, dropped)
        for name, files in files_without_documents(units, complete).items():
            if files:
                self._notes(named("no document", name, files))
        manifest = self._assemble(context.work, complete, tokenizer)
        publish(root, context.work, manifest)
        remove_work(context.work)
        return manifest

    def _assemble(self, work: Path, facts: list[UnitFacts], tokenizer: Tokenizer) -> Manifest:
        names = source_names(self._config)
        assembly = plan_assembly(work, names, self.plan.units, facts, self._config, tokenizer)
        tasks = assembly.tasks()
        total = sum(task.tokens for task in tasks) * np.dtype(assembly.dtype).itemsize
        advance = self.report("write", total)
        shards = list(self._crew.run(functools.partial(write_shard, assembly), tasks, advance))
        # No process may hold files of the work, which is to be removed.
        self._crew.dismiss()
        forget_files()
        return describe(self._config, self.plan, facts, tokenizer, assembly, list(zip(tasks, shards, strict=True)))


def _looks(config: DataConfig) -> bool:
    """Whether something must be known of every document before it is decided which stay, and where."""
    filtered = any(source.filter != FilterConfig() for source in config.sources.values())
    return filtered or config.split.rule == "tail" or config.duplicates.rule != "keep"
