"""A study: runs that differ in what is compared, as one YAML file describes them. Free of torch."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError, model_validator

from data_pipeline.errors import ConfigError
from data_pipeline.secret import WAY_ON, key_of_secret
from pretrain.config import yaml_files
from pretrain.config.keys import Keys, keys_of
from pretrain.config.layers import spelt_out
from pretrain.config.schema import Config, load

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
"""It is that of a folder, too."""
Form = TypeVar("Form", bound=BaseModel)
Counted = Literal["parameters", "training FLOPs"]
Number = TypeVar("Number", int, float)


def distinct(values: list[Number]) -> list[Number]:
    """Those that folders tell apart.

    Raises:
        ValueError: two would be one.
    """
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"given twice: {', '.join(sorted(twice))}")
    return values


Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1), AfterValidator(distinct)]
"""Values of `run.seed`."""


class Arm(BaseModel, extra="forbid", frozen=True):
    """One of the things that are compared."""

    about: str
    """A few words for the tables."""
    config: list[str]
    """Presets and overrides, as `duet train` takes them."""


class Equal(BaseModel, extra="forbid", frozen=True):
    """Arms that must not differ in size or cost; a study in which they do is not run."""

    what: Counted
    arms: list[str] = Field(min_length=2)
    """Of the section, or SECTION/ARM."""
    within: float = Field(gt=0.0)
    """Most that the largest may be above the smallest, as a share."""


class Section(BaseModel, extra="forbid", frozen=True):
    """Arms that are compared in one table."""

    title: str
    unit: Literal["nats per token", "bits per byte"] = "nats per token"
    """Of the validation losses in the tables."""
    config: list[str] = []
    """Of every run of the section, behind what the study has."""
    seeds: Seeds
    """Each arm is run with each."""
    arms: dict[Name, Arm] = {}
    arms_of: str | None = None
    """Take the arms of this section, each with each of `settings`; their table has a column for each setting."""
    settings: dict[Name, list[str]] = {}
    """With `arms_of`: name and overrides."""
    unchanged: str = "unchanged"
    """With `arms_of`: what the column of that section's own runs is called."""
    beside: list[str] = []
    """SECTION/ARM of other sections to show in the same table, above."""
    baseline: str | None = None
    """SECTION/ARM that the others' losses are compared with."""
    equal: list[Equal] = []
    on_request: bool = False
    """Only run when it is named: it needs hardware or data that not everyone has."""

    @model_validator(mode="after")
    def _arms_are_its_own_or_anothers(self) -> "Section":
        if bool(self.arms) == bool(self.arms_of):
            raise ValueError("give either arms or arms_of")
        if bool(self.settings) != bool(self.arms_of):
            raise ValueError("arms_of and settings need each other")
        return self


class Study(BaseModel, extra="forbid", frozen=True):
    """A study, as its file has it."""

    name: Name
    """Of the folder below `runs` that holds its runs, and of the experiment in MLflow."""
    config: list[str]
    """Of every run."""
    sections: dict[Name, Section]

    @model_validator(mode="after")
    def _references_are_there(self) -> "Study":
        arms = {f"{name}/{arm}" for name, section in self.sections.items() for arm in section.arms}
        for name, section in self.sections.items():
            if section.arms_of and not self.sections.get(section.arms_of, section).arms:
                raise ValueError(f"sections.{name}.arms_of: {section.arms_of} has no arms")
            for other in (*section.beside, *([section.baseline] if section.baseline else [])):
                if other not in arms:
                    raise ValueError(f"sections.{name}: there is no {other}; there are {', '.join(sorted(arms))}")
            for equal in section.equal:
                if missing := {arm if "/" in arm else f"{name}/{arm}" for arm in equal.arms} - arms:
                    raise ValueError(f"sections.{name}.equal: no arms {', '.join(sorted(missing))}")
        return self

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return Path("runs") / self.name

    def arms(self, section: str) -> dict[str, Arm]:
        """Those of a section, its own or another's."""
        found = self.sections[section]
        return found.arms or self.sections[found.arms_of or section].arms

    def runs(self, wanted: list[str] | None = None) -> list["StudyRun"]:
        """All runs but those on request, or those of the `wanted` sections (SECTION) and arms (SECTION/ARM).

        In the order of the sections; in each, all arms with the first seed, then with the second: what is there
        after a while can be compared.

        Raises:
            ConfigError: there is no such section or arm.
        """
        found = [run for name in self.sections for run in self._of_section(name)]
        if wanted is None:
            return [run for run in found if not self.sections[run.section].on_request]
        for name in wanted:
            if not any(run.within(name) for run in found):
                places = (f"{section} ({', '.join(self.arms(section))})" for section in self.sections)
                raise ConfigError(f"{name}: no such section or arm; sections, with their arms: {', '.join(places)}")
        return [run for run in found if any(run.within(name) for name in wanted)]

    def _of_section(self, name: str) -> Iterator["StudyRun"]:
        section = self.sections[name]
        for seed in section.seeds:
            for setting, overrides in section.settings.items() or [(None, [])]:
                for arm, what in self.arms(name).items():
                    args = [*self.config, *section.config, *what.config, *overrides]
                    yield StudyRun(self, name, setting, arm, seed, tuple(args))


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    study: Study
    section: str
    setting: str | None
    arm: str
    seed: int
    settings: tuple[str, ...]
    """What it is made of, without name and folder."""

    @property
    def place(self) -> str:
        """Its folder, below that of the study."""
        return "/".join(part for part in (self.section, self.setting, self.arm, f"seed-{self.seed}") if part)

    @property
    def path(self) -> Path:
        """Its run folder."""
        return self.study.folder / self.place

    @property
    def args(self) -> list[str]:
        """What `duet train` gets."""
        tracked = {
            "tracking.experiment": self.study.name,
            "tracking.uri": f"sqlite:///{self.study.folder / 'mlflow.db'}",
        }
        before, behind = ([f"{key}={value}" for key, value in said.items()] for said in (tracked, self._own))
        return [*before, *self.settings, *behind]

    @property
    def _own(self) -> dict[str, str]:
        """What the study alone says."""
        return {"run.name": self.place.replace("/", "-"), "run.dir": str(self.path), "run.seed": str(self.seed)}

    def config(self) -> Config:
        """As `load` makes it of `args`. Raises ConfigError, too, where the settings hold what the study says."""
        if given := [setting for setting in self.settings if setting.partition("=")[0] in self._own]:
            raise ConfigError(f"{given[0]}: a study names its runs, and its `seeds` are their seeds; leave it out")
        return load(self.args)

    def within(self, name: str) -> bool:
        """Whether it belongs to a section, or to SECTION/ARM."""
        return name in (self.section, f"{self.section}/{self.arm}")


def load_study(path: Path) -> Study:
    """Read a study and check the configuration of every run.

    Raises:
        ConfigError: it is not there, or something in it is wrong; names the place.
    """
    content = read_yaml(path)
    if isinstance(content, dict) and "sizes" in content:
        raise ConfigError(f"{path}: a study has no sizes; this is a ladder: duet study ladder {shlex.quote(str(path))}")
    study = parsed(Study, content, path)
    for run in study.runs(list(study.sections)):
        if run.seed != study.sections[run.section].seeds[0]:  # with another seed nothing else is wrong
            continue
        try:
            run.config()
        except ConfigError as error:
            raise ConfigError(f"{path}: {run.place}: {error}") from error
    return study


def read_yaml(path: Path) -> object:
    """What a study's file holds.

    Raises:
        ConfigError: it is not there, no YAML, or holds a secret.
    """
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise ConfigError(f"{path}: no such file; a study is a YAML file")
        content = yaml_files.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if key := key_of_secret(content):
        raise ConfigError(f"{path}: {key}: {WAY_ON}")
    if isinstance(content, dict) and content and content.keys() <= Config.model_fields.keys():
        command = shlex.join(["duet", "train", str(path)])
        raise ConfigError(f"{path}: this configures one run, and a study is wanted; `{command}` trains it")
    return content


def parsed(form: type[Form], content: object, path: Path) -> Form:
    """The content of `path` as a model.

    Raises:
        ConfigError: something in it is wrong; names the place.
    """
    try:
        return form.model_validate(spelt_out(content, form, Keys(form, form)))
    except ValidationError as error:
        told = (_told(detail, Keys(form, form)) for detail in error.errors())
        raise ConfigError("\n".join(f"{path}: {line}" for line in told)) from error


def _told(detail: Any, keys: Keys) -> str:
    """One of pydantic's errors: where, and what is wrong."""
    location = list(map(str, detail["loc"]))
    given = f" (given: {detail['input']!r})" if isinstance(detail["input"], str | int | float) else ""
    message = detail["msg"].removeprefix("Value error, ") + given
    if detail["type"] == "extra_forbidden":
        message = f"unknown key; there are {', '.join(keys_of(keys.at(location[:-1])))}"
    elif detail["type"] == "missing":
        message = "is missing"
    elif detail["type"] == "string_pattern_mismatch":
        message = f"{detail['input']!r} is no name here: small letters, digits, `.` and `-`, the first no `.` or `-`"
    return ": ".join(filter(None, [".".join(location), message]))
