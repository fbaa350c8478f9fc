"""A ladder: arms at several sizes, at equal training FLOPs within a size, each at a learning rate that was looked for.

One YAML file becomes two studies: rates at the two smallest sizes, then all sizes at the rates that follow from them.
Free of torch.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, model_validator

from data_pipeline.errors import ConfigError
from data_pipeline.storage.manifest import Manifest
from model.costs.flops import executed_flops_per_token
from model.costs.totals import num_parameters
from pretrain.config.dataset_identity import Built, complete
from pretrain.config.schema import Config, load
from pretrain.study.results import Result, Results, mean
from pretrain.study.spec import Arm, Name, Section, Seeds, Study, distinct, parsed, read_yaml

SEARCHED = 2
"""Sizes at which learning rates are tried: the smallest ones."""
STEEPEST = -0.5
"""Of the exponent by which learning rates fall with size; two sizes do not tell it well."""
OWN = ("optimizer.lr", "schedule.final_lr", "train.steps", "train.tokens")
"""Keys that it sets in each run."""
FINAL = 0.1
"""Of the learning rate, what is left at the end."""
FIT = "fit"
"""The name of the curves' table in the page; its picture is `fit-curves`."""
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Size(BaseModel, extra="forbid", frozen=True):
    """A rung."""

    about: str
    """A few words for the tables."""
    config: list[str]
    """Presets and overrides, behind those of the arm."""
    tokens: int = Field(ge=1)
    """That the baseline trains on; the others train as many FLOPs."""
    seeds: Seeds | None = None
    """Instead of the ladder's."""


class Ladder(BaseModel, extra="forbid", frozen=True):
    """A ladder, as its file has it."""

    name: Name
    """Of the folder below `runs` that holds its runs, and of the experiment in MLflow."""
    config: list[str]
    """Of every run."""
    unit: Literal["nats per token", "bits per byte"] = "bits per byte"
    seeds: Seeds
    arms: dict[Name, Arm] = Field(min_length=2)
    baseline: Name
    sizes: dict[Name, Size] = Field(min_length=SEARCHED)
    """From the smallest to the largest."""
    rates: Annotated[list[Rate], Field(min_length=2), AfterValidator(distinct)]
    """Learning rates that are tried, with the first seed."""
    _loaded: dict[tuple[str, str], Config] = PrivateAttr(default_factory=dict)
    """By size and arm: to load one takes 17 ms, and each is asked for a dozen times."""

    @model_validator(mode="after")
    def _the_baseline_is_there(self) -> "Ladder":
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: there is no arm {self.baseline}; there are {', '.join(self.arms)}")
        if taken := [name for name in self.sizes if name == FIT or name in self._searched.values()]:
            raise ValueError(f"sizes.{taken[0]}: a table of the page has this name; take another")
        return self

    @property
    def _searched(self) -> dict[str, str]:
        """The sections of `search`, by size."""
        return {name: f"rates-{name}" for name in list(self.sizes)[:SEARCHED]}

    def search(self) -> Study:
        """Every arm at each of `rates`, at the smallest sizes."""
        sections = {}
        for name, section in self._searched.items():
            arms = {
                _tried(arm, rate): Arm(about=f"{what.about}, at {rate:g}", config=self._config(name, arm, rate))
                for arm, what in self.arms.items()
                for rate in sorted(self.rates)
            }
            title = f"Learning rates: {self.sizes[name].about}"
            sections[section] = Section(title=title, unit=self.unit, seeds=self.seeds[:1], arms=arms)
        return Study(name=self.name, config=self.config, sections=sections)

    def climb(self, rates: dict[str, dict[str, float]]) -> Study:
        """`search`, and every arm at every size, at `rates` by size and arm."""
        sections = dict(self.search().sections)
        for name, size in self.sizes.items():
            arms = {
                arm: Arm(
                    about=f"{what.about}, at {rates[name][arm]:.2g}", config=self._config(name, arm, rates[name][arm])
                )
                for arm, what in self.arms.items()
            }
            seeds, baseline = size.seeds or self.seeds, f"{name}/{self.baseline}"
            sections[name] = Section(title=size.about, unit=self.unit, seeds=seeds, arms=arms, baseline=baseline)
        return Study(name=self.name, config=self.config, sections=sections)

    def rates_of(self, results: Results) -> dict[str, dict[str, float]]:
        """The learning rate of each arm at each size, from what `search` came to.

        An arm's own best (`vertex`) at the sizes where it was looked for; above, the second one's times
        (N / N2)^p in parameters without tables, with p the mean over the arms, between STEEPEST and 0.

        Raises:
            ConfigError: a run of the search is missing; an arm has diverged at every rate.
        """
        names = list(self.sizes)
        best = {name: dict(self._best(name, results)) for name in names[:SEARCHED]}
        size = {name: {arm: self._parameters(name, arm) for arm in self.arms} for name in names}
        first, second = names[:SEARCHED]
        slopes = (
            math.log(best[second][arm] / best[first][arm]) / math.log(size[second][arm] / size[first][arm])
            for arm in self.arms
        )
        p = min(0.0, max(STEEPEST, mean(slopes)))
        for name in names[SEARCHED:]:
            best[name] = {
                arm: _rounded(best[second][arm] * (size[name][arm] / size[second][arm]) ** p) for arm in self.arms
            }
        return best

    def _best(self, name: str, results: Results) -> Iterator[tuple[str, float]]:
        for arm in self.arms:
            found: list[tuple[float, Result]] = [
                (rate, result)
                for rate in sorted(self.rates)
                for result in results.of(self._searched[name], _tried(arm, rate))
            ]
            if len(found) < len(self.rates):
                raise ConfigError(f"{self._searched[name]}: {arm} was not trained at every rate yet")
            if not any(math.isfinite(result.loss) for _, result in found):
                raise ConfigError(f"{self._searched[name]}: {arm} diverged at every rate; rates: give lower ones")
            yield arm, _rounded(vertex([rate for rate, _ in found], [result.loss for _, result in found]))

    def _config(self, size: str, arm: str, rate: float) -> list[str]:
        rung = [*self.arms[arm].config, *self.sizes[size].config]
        return [
            *rung,
            f"optimizer.lr={rate:g}",
            f"schedule.final_lr={rate * FINAL:g}",
            f"train.steps={self._steps(size, arm)}",
        ]

    def _steps(self, size: str, arm: str) -> int:
        budget = _flops_per_token(self.loaded(size, self.baseline)) * self.sizes[size].tokens
        config = self.loaded(size, arm)
        return max(1, round(budget / (_flops_per_token(config) * config.batch.tokens)))

    def _parameters(self, size: str, arm: str) -> int:
        """Without the table of the vocabulary."""
        model = self.loaded(size, arm).model
        return num_parameters(model) - (model.vocab_size or 0) * model.width

    def check(self, size: str, arm: str) -> None:
        """Raises ConfigError where its runs cannot be, or where it is smaller than the size before."""
        rung = [*self.arms[arm].config, *self.sizes[size].config]
        if given := [one for one in rung if one.partition("=")[0] in OWN]:
            raise ConfigError(f"{given[0]}: a ladder has `rates` and `tokens` for that; leave it out")
        load([*self.config, *self._config(size, arm, self.rates[0])])
        names = list(self.sizes)
        if size == names[0]:
            return
        before = names[names.index(size) - 1]
        own, its = self._parameters(size, arm), self._parameters(before, arm)
        if own < its or (own == its and size in self._searched):  # two of a size do not tell what a rate follows
            raise ConfigError(
                f"{own:,} parameters without the table of tokens, and sizes.{before} has {its:,}; sizes are given from "
                "the smallest to the largest"
            )

    def loaded(self, size: str, arm: str) -> Config:
        """Of an arm at a size, but for steps and learning rate."""
        if (size, arm) not in self._loaded:
            config = load([*self.config, *self.arms[arm].config, *self.sizes[size].config])
            if config.model.vocab_size is None:  # else a page is written without the dataset, too
                config = complete(config, Built(Manifest.load(config.data.path)))
            self._loaded[size, arm] = config
        return self._loaded[size, arm]


def training_flops(config: Config) -> float:
    """Of the whole training, without those of blocks that are closed and not computed."""
    return _flops_per_token(config) * config.batch.tokens * config.train.steps


def vertex(rates: list[float], losses: list[float]) -> float:
    """The lowest point of the parabola in log rate through the best rate and its neighbours; the best rate where it has
    not two, or one of them diverged."""
    at = losses.index(min(losses))
    if at in (0, len(rates) - 1) or not all(map(math.isfinite, losses[at - 1 : at + 2])):
        return rates[at]
    (x0, x1, x2), (y0, y1, y2) = (math.log(rate) for rate in rates[at - 1 : at + 2]), losses[at - 1 : at + 2]
    below, above = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if above == below:
        return rates[at]
    return math.exp((x0 + x1) / 2 - below * (x2 - x0) / (2 * (above - below)))


def load_ladder(path: Path) -> Ladder | None:
    """Read a ladder; None where the file is a study without sizes.

    Raises:
        ConfigError: as `load_study`.
        DataError: there is no dataset, by whose vocabulary FLOPs are counted unless model.vocab_size is given.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or "sizes" not in content:
        return None
    ladder = parsed(Ladder, content, path)
    for size in ladder.sizes:
        for arm in ladder.arms:
            try:
                ladder.check(size, arm)
            except ConfigError as error:
                raise ConfigError(f"{path}: sizes.{size}, arms.{arm}: {error}") from error
    return ladder


def _flops_per_token(config: Config) -> float:
    return executed_flops_per_token(config.model, config.objective.of_pairs, training=True)


def _tried(arm: str, rate: float) -> str:
    return f"{arm}.{rate:g}".replace("+", "")  # of 1e+06, which no name has


def _rounded(rate: float) -> float:
    """Two digits, which is what the search can tell."""
    return float(f"{rate:.2g}")
