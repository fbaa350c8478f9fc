"""The tables of a study, written into its page between marks; the words around them are the author's."""

import math
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.files.atomic import write_atomic
from pretrain.metric_names import MASK_MEAN, NEAR_ONE, NEAR_ZERO, VALIDATION_DENSITY
from pretrain.study.ladder import training_flops
from pretrain.study.results import CONFIG, JOURNAL, Result, Results, mean
from pretrain.study.spec import Study

MARK = re.compile(r"<!-- (results|picture): ([^ ]+) -->\n.*?<!-- end -->", re.DOTALL)
NOT_RUN = "not run"


@dataclass(frozen=True)
class Page:
    """Where a study's page, pictures and kept results are."""

    study: Study
    results: Results
    file: Path
    more: dict[str, list[str]] = field(default_factory=dict)
    """The lines of tables that are no section's, by name."""
    later: list[str] = field(default_factory=list)
    """Pictures for which a page that is begun has marks, though there may be nothing to show yet."""
    computed: bool = False
    """FLOPs are told without those of closed blocks."""

    def write(self, pictures: dict[str, bytes]) -> None:
        """Fill the marks of the page; a page that is not there is begun with all of them.

        Args:
            pictures: PNG by name; each is written beside the results.

        Raises:
            ConfigError: a mark names a section or a picture that is not there.
        """
        folder = self.results.folder.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            write_atomic(folder / f"{name}.png", content)
        text = (
            self.file.read_text(encoding="utf-8")
            if self.file.is_file()
            else "".join(self._begun([*self.later, *pictures]))
        )

        def filled(mark: re.Match[str]) -> str:
            kind, name = mark.groups()
            if kind == "results" and name in self.study.sections:
                content = "\n".join(self.table(name))
            elif kind == "results" and name in self.more:
                content = "\n".join(self.more[name])
            elif kind == "picture" and (name in pictures or (folder / f"{name}.png").is_file()):
                content = f"![{name.replace('-', ' ')}]({self._link(folder / f'{name}.png')})"
            elif kind == "picture" and name.rpartition("-")[0] in {*self.study.sections, *self.more}:
                content = f"*{NOT_RUN}*"
            else:
                raise ConfigError(f"{self.file}: no {kind} {name} in this study; change or remove the mark")
            return f"<!-- {kind}: {name} -->\n{content}\n<!-- end -->"

        write_atomic(self.file, MARK.sub(filled, text))

    def table(self, section: str) -> Iterator[str]:
        """The lines of a section's tables."""
        wanted = self.study.sections[section]
        if wanted.settings:
            yield from self._settings(section)
            arms = {
                f"{arm}, {name}": self.results.of(section, arm, name)
                for name in wanted.settings
                for arm in self.study.arms(section)
            }
        else:
            yield from self._losses(section)
            arms = {arm: self.results.of(name, arm) for name, arm in self._rows(section)}
        masked = {name: found for name, found in arms.items() if any(MASK_MEAN in result.points for result in found)}
        if masked:
            yield ""
            yield from self._masks(masked)

    def _rows(self, section: str) -> list[tuple[str, str]]:
        """Section and name of each arm in its table: those beside it, then its own."""
        beside = [
            (name, arm) for name, _, arm in (other.partition("/") for other in self.study.sections[section].beside)
        ]
        return beside + [(section, arm) for arm in self.study.arms(section)]

    def _losses(self, section: str) -> Iterator[str]:
        wanted = self.study.sections[section]
        baseline = self.results.of(*_split(wanted.baseline)) if wanted.baseline else []
        against = f" against {_split(wanted.baseline)[1]} |" if wanted.baseline else ""
        yield (
            f"| arm | parameters | training FLOPs{', computed' if self.computed else ''} | "
            f"validation, {wanted.unit}, by seed | mean | spread |{against} "
            "tokens/s |"
        )
        yield "|---" * (7 + bool(against)) + "|"
        for name, arm in self._rows(section):
            found = self.results.of(name, arm)
            label = f"**{arm}**: {self.study.arms(name)[arm].about}"
            if not found:
                yield f"| {label} " + f"| {NOT_RUN} " + "| – " * (5 + bool(against)) + "|"
                continue
            losses = [result.loss for result in found]
            difference = f" {'–' if found == baseline else _difference(found, baseline)} |" if against else ""
            seeds = ", ".join(self._linked(result) for result in found)
            missing = set(self.study.sections[name].seeds) - {result.run.seed for result in found}
            seeds += "".join(f", seed {seed} {NOT_RUN}" for seed in sorted(missing))
            config = self._link(self.results.folder / found[0].run.place / CONFIG)
            flops = training_flops(found[0].config) if self.computed else found[0].flops
            cost = "–" if flops is None else f"{flops:.3g}"
            speeds = [result.speed for result in found if not result.diverged]
            speed = f"{mean(speeds):,.0f}" if speeds else "–"
            spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "–"
            yield (
                f"| [{label}]({config}) | {found[0].parameters:,} | {cost} | {seeds} | "
                f"{_written(mean(losses))} | {spread} |{difference} {speed} |"
            )

    def _masks(self, arms: dict[str, list[Result]]) -> Iterator[str]:
        yield (
            "| masks of | mean m at the start | after a quarter | half | at the end | of them below 0.1 | above 0.9 | "
            "open in evaluation | loss, masks at the threshold | sampled as in training | not rounded |"
        )
        yield "|---" * 11 + "|"
        for name, found in arms.items():
            steps = found[0].config.train.steps
            course = [
                _mean_at(found, MASK_MEAN, 1),
                _mean_at(found, MASK_MEAN, steps // 4),
                _mean_at(found, MASK_MEAN, steps // 2),
                _by_seed(found, MASK_MEAN),
            ]
            shares = [_by_seed(found, NEAR_ZERO), _by_seed(found, NEAR_ONE)]
            cells = [*course, *shares, _by_seed(found, VALIDATION_DENSITY)]
            for kind in ("threshold", "sample", "none"):
                losses = [r.roundings[kind][r.metric] for r in found if kind in r.roundings]
                cells.append(f"{mean(losses):.4f}" if losses else "–")
            yield f"| {name} | " + " | ".join(cells) + " |"

    def _settings(self, section: str) -> Iterator[str]:
        """A row an arm, a column a setting; the lowest loss of each row in bold."""
        wanted = self.study.sections[section]
        assert wanted.arms_of
        yield f"| {wanted.unit} | {wanted.unchanged} | " + " | ".join(wanted.settings) + " |"
        yield "|---" * (2 + len(wanted.settings)) + "|"
        for arm in self.study.arms(section):
            found = [r for r in self.results.of(wanted.arms_of, arm) if r.run.seed in wanted.seeds]
            columns = [found, *(self.results.of(section, arm, setting) for setting in wanted.settings)]
            losses = [mean(result.loss for result in column) if column else None for column in columns]
            best = min((loss for loss in losses if loss is not None), default=None)
            cells = []
            for column, loss in zip(columns, losses, strict=True):
                if loss is None:
                    cells.append(NOT_RUN)
                    continue
                seeds = ", ".join(self._linked(result) for result in column)
                seeds += f"; mean {loss:.4f}" if len(column) > 1 else ""
                cells.append(f"**{seeds}**" if loss == best else seeds)
            yield f"| {arm} | " + " | ".join(cells) + " |"

    def _linked(self, result: Result) -> str:
        return f"[{_written(result.loss)}]({self._link(self.results.folder / result.run.place / JOURNAL)})"

    def _link(self, target: Path) -> str:
        return os.path.relpath(target, self.file.parent)

    def _begun(self, pictures: list[str]) -> Iterator[str]:
        yield f"# {self.study.name}\n"
        titles = {name: name.capitalize() for name in self.more}
        titles |= {name: section.title for name, section in self.study.sections.items()}
        for name, title in titles.items():
            yield f"\n## {title}\n\n<!-- results: {name} -->\n<!-- end -->\n"
            for picture in dict.fromkeys(pictures):
                if picture.rpartition("-")[0] == name:
                    yield f"\n<!-- picture: {picture} -->\n<!-- end -->\n"


def _written(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "∞, diverged"


def _split(arm: str | None) -> tuple[str, str]:
    section, _, name = (arm or "").partition("/")
    return section, name


def _difference(found: list[Result], baseline: list[Result]) -> str:
    """Mean difference of the seeds both have, and its standard error: the seeds share data order and batches."""
    losses = {result.run.seed: result.loss for result in baseline}
    pairs = [result.loss - losses[result.run.seed] for result in found if result.run.seed in losses]
    if not pairs:
        return "–"
    if len(pairs) == 1:
        return f"{pairs[0]:+.4f}"
    return f"{mean(pairs):+.4f} ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.4f}"


def _mean_at(found: list[Result], name: str, step: int) -> str:
    values = [value for result in found if (value := result.at(name, step)) is not None]
    return f"{mean(values):.3f}" if values else "–"


def _by_seed(found: list[Result], name: str) -> str:
    values = [value for result in found if (value := result.at(name)) is not None]
    return ", ".join(f"{value:.3f}" for value in values) or "–"
