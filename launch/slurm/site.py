"""A Slurm site, described once: what `duet submit --cluster` reads. Free of torch."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from data_pipeline.errors import ConfigError
from data_pipeline.secret import HIDDEN, has_secret, is_secret_name, key_of_secret
from duet_pretrain import SOURCE
from pretrain.config import yaml_files
from pretrain.config.keys import Keys
from pretrain.config.layers import spelt_out

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIMES = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def _line(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("expected one line of text")
    return value


def _word(value: str) -> str:
    if " " in _line(value):
        raise ValueError("expected one word")
    return value


Line = Annotated[str, AfterValidator(_line)]
Word = Annotated[str, AfterValidator(_word)]
"""A value of one of sbatch's options."""


class Cluster(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One site: where its jobs go, what a node has, and how Python gets into a job there."""

    partition: Word | None = None
    """The site's default unless given."""
    account: Word | None = None
    """What the time is charged to; many sites refuse a job without one."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that the nodes must have."""
    time: str = Field(default="24:00:00", coerce_numbers_to_str=True)
    """Time limit of a job, in one of Slurm's forms: minutes, H:M:S, D-H, D-H:M:S."""
    nodes: str = Field(default="1", coerce_numbers_to_str=True)
    """Nodes of a job, or a range such as `2-8`."""
    gpus_per_node: int = Field(default=8, ge=0)
    """A rank for each; 0 for nodes without a GPU."""
    gpu_memory_gib: float | None = Field(default=None, gt=0.0)
    """Of one GPU: what a model's state is compared with before a job waits for days."""
    tasks_per_node: int | None = Field(default=None, ge=1)
    """Ranks of a node without a GPU; 1 unless given."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Processors of a rank."""
    memory: Word | None = None
    """Of a node, as for `--mem`: 500G; 0 is all of it."""
    exclusive: bool = False
    """Nobody else's jobs on these nodes."""
    container: Word | None = None
    """Image for pyxis (Enroot): `--container-image`."""
    apptainer: Word | None = None
    """Image for Apptainer, instead."""
    mounts: list[Word] = []
    """Folders that a container sees, as SOURCE or SOURCE:TARGET."""
    modules: list[Word] = []
    """Loaded in this order before anything else."""
    setup: Line | None = None
    """A shell file that is sourced: a virtual environment's `activate`, or a site's own."""
    python: Word | None = None
    """The interpreter that has Duet's dependencies, as the nodes see it; the one that submits unless given, and in a
    container `python`."""
    scratch: Line | None = None
    """A folder on each node's own disk, for caches and copies of the data."""
    requeue: bool = True
    """Whether a job may go back into the queue; where the site forbids it, `duet submit --chain`."""
    signal_lead: int = Field(default=300, ge=1)
    """Seconds before the time limit at which the run is told to save."""
    preflight: bool = False
    """Test nodes and network at each start of a job (`duet preflight`)."""
    sbatch: list[Line] = []
    """Further options of sbatch, such as `--reservation=maintenance`."""
    environment: dict[str, Line] = {}
    """Variables of the job, such as `NCCL_SOCKET_IFNAME`. Files that hold them are for their owner alone."""

    @field_validator("time")
    @classmethod
    def _a_time_of_slurm(cls, value: str) -> str:
        seconds(value)
        return value

    @field_validator("nodes")
    @classmethod
    def _nodes_are_a_range(cls, value: str) -> str:
        node_range(value)
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            if not VARIABLE.fullmatch(str(name)):
                raise ValueError(f"{name!r} is not the name of a variable")
        return {k: str(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in value.items()}

    @field_validator("sbatch")
    @classmethod
    def _options_are_options(cls, value: list[str]) -> list[str]:
        for option in value:
            if not option.startswith("-"):  # else it would be taken for the script
                raise ValueError(f"{option!r} is not an option; write it as one word, such as --reservation=NAME")
        return value

    @model_validator(mode="after")
    def _the_parts_fit(self) -> "Cluster":
        if self.gpus_per_node and self.tasks_per_node:
            raise ValueError("tasks_per_node is for gpus_per_node: 0; a GPU has one rank, so leave it out")
        if not self.gpus_per_node and self.gpu_memory_gib:
            raise ValueError("gpu_memory_gib, but gpus_per_node: 0; leave one of them out")
        if self.container and self.apptainer:
            raise ValueError("container is for pyxis, apptainer for Apptainer; a job runs in one of them")
        if self.mounts and not (self.container or self.apptainer):
            raise ValueError("mounts are for a container; name one in container or apptainer")
        if self.signal_lead >= seconds(self.time):
            raise ValueError(
                f"signal_lead: {self.signal_lead} s is the whole time: {self.time} or more; the run would be told to "
                "stop at its start"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """One a GPU; without GPUs as many as `tasks_per_node`."""
        return self.gpus_per_node or self.tasks_per_node or 1

    def shown(self) -> "Cluster":
        """The same without the values of its environment that are most likely secret."""
        hidden = {
            name: HIDDEN if is_secret_name(name) or has_secret(value) else value
            for name, value in self.environment.items()
        }
        return self.model_copy(update={"environment": hidden})


def seconds(time: str) -> int:
    """Of a time limit in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: it is none of them, or nothing at all.
    """
    match = _TIMES.fullmatch(time)
    if not match:
        raise ValueError(f"{time!r} is not a time limit; write minutes, H:M:S, D-H or D-H:M:S, such as 24:00:00")
    days, *rest = match.group("d", "a", "b", "c")
    a, b, c = (int(part or 0) for part in rest)
    if days is not None:
        total = ((int(days) * 24 + a) * 60 + b) * 60 + c
    elif rest[2] is not None:
        total = (a * 60 + b) * 60 + c
    else:
        total = a * 60 + b
    if not total:
        raise ValueError(f"{time!r} is no time at all")
    return total


def node_range(nodes: str) -> tuple[int, int]:
    """Fewest and most nodes of `4` or `2-8`.

    Raises:
        ValueError: it is neither.
    """
    match = _RANGE.fullmatch(nodes)
    least = int(match[1]) if match else 0
    most = int(match[2] or match[1]) if match else 0
    if not 1 <= least <= most:
        raise ValueError(f"{nodes!r} is not a number of nodes; write 4, or a range such as 2-8")
    return least, most


def load(name: str) -> Cluster:
    """The site that `name` means: a YAML file, one of the user's own (`folder()`), or a preset.

    Raises:
        ConfigError: there is none, or it cannot be used; names what is there, or the key.
    """
    path = Path(name)
    short = name.removeprefix("cluster/")
    if path.is_file():
        where, text = str(path), _text(path)
    elif (own := folder() / f"{short}.yaml").is_file():
        where, text = str(own), _text(own)
    elif short in shipped():
        where, text = f"cluster/{short}", (SOURCE / "configs" / "cluster" / f"{short}.yaml").read_text()
    else:
        there = sorted({file.stem for file in folder().glob("*.yaml")} | set(shipped()))
        near = difflib.get_close_matches(short, there, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--cluster {name}: no such file or preset; {hint}there are: {', '.join(there)}; "
            f"describe your site in {folder()}/NAME.yaml"
        )
    try:
        tree = yaml_files.parse(text, where)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as YAML: {error}") from error
    return parse(tree, where)


def parse(tree: Any, where: str) -> Cluster:
    """The site of a YAML tree; `where` is named in errors.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values, such as `partition: gpu`")
    if key := key_of_secret({name: value for name, value in tree.items() if name != "environment"}):
        raise ConfigError(f"{where}: {key}: a password, key or token belongs in `environment`, or in the job's own")
    try:
        return Cluster.model_validate(spelt_out(tree, Cluster, Keys(Cluster, Cluster)))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, where) for detail in error.errors())) from error


def dump(cluster: Cluster) -> str:
    """The site as YAML, every value included."""
    return yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in (SOURCE / "configs" / "cluster").glob("*.yaml"))


def folder() -> Path:
    """Where a user describes sites."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "duet" / "cluster"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _explain(detail: Any, where: str) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Cluster.model_fields, n=1, cutoff=0.0)
        return f"{where}: unknown key {key}; nearest valid key: {near[0]}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" or key.startswith("environment") else f" (given: {detail['input']!r})"
    return f"{where}: {key + ': ' if key else ''}{message}{given}"
