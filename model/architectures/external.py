"""Architectures from outside: a class in a file (`FILE.py:Name`), or an installed one (`duet.architectures`).

What is written down of one holds the sha256 of its source, `FILE.py:Name@SHA256`: only source of that hash is run.
"""

import hashlib
import re
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NamedTuple, get_args

from data_pipeline.errors import ConfigError
from model.architectures import measured
from model.config.mask_config import Site
from model.config.model_config import ModelConfig, Traits

FOLDER, GROUP = "architecture", "duet.architectures"
"""In a run folder and in an export: where the source lies. And the entry points of installed packages."""
_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?:@(?P<sha256>[0-9a-f]{64}))?", re.DOTALL)
_INSTALLED = re.compile(r"(?P<name>[\w.-]+?)(?:@(?P<sha256>[0-9a-f]{64}))?")


class Named(NamedTuple):
    """What `model.architecture` says of an architecture that is not ours."""

    file: str | None
    """None: it is an installed one."""
    name: str
    sha256: str | None
    """Of the source that it was; None: whatever it is now."""

    @property
    def pinned(self) -> str:
        """As it is written down."""
        place = self.name if self.file is None else f"{self.file}:{self.name}"
        return f"{place}@{self.sha256}"


class Recorded(ModelConfig, extra="allow", frozen=True):
    """What the files of a run hold of a model whose source is not run: the keys as they are."""

    traits: ClassVar = Traits((), "is not loaded", causal=False, documents_apart=True)

    def check_objective(self, objective: str) -> None:
        """What it can learn from, its source says."""

    @property
    def dropout_sites(self) -> tuple[Site, ...]:
        """One that stands for all, where there are some."""
        masks = (self.model_extra or {}).get("learned_dropout")
        return ("embed",) if isinstance(masks, dict) and masks.get("enabled") else ()


def parse(architecture: str) -> Named:
    """What a name says. Raises ValueError if it is a file's without a class."""
    if found := _IN_FILE.fullmatch(architecture):
        return Named(found["file"], found["name"], found["sha256"])
    found = _INSTALLED.fullmatch(architecture)
    if found and not architecture.endswith(".py"):
        return Named(None, found["name"], found["sha256"])
    raise ValueError(
        f"architecture={architecture}: expected a name, or FILE.py:NAME with the name of a class in the file"
    )


def is_external(architecture: object) -> bool:
    """Whether a name that was written down is of an architecture that is not ours."""
    return isinstance(architecture, str) and parse(architecture).sha256 is not None


def same(one: object, other: object) -> bool:
    """Whether two names mean the same class of the same source, wherever that lies."""
    return is_external(one) and is_external(other) and parse(str(one))[1:] == parse(str(other))[1:]


def absolute(architecture: str, base: Path) -> str:
    """A file's place as seen from the folder `base`; other names as they are."""
    if not _IN_FILE.fullmatch(architecture):
        return architecture
    named = parse(architecture)
    place = named._replace(file=str((base / Path(named.file or "").expanduser()).absolute()))
    return place.pinned if named.sha256 else place.pinned.removesuffix("@None")


def without_folder(architecture: str) -> str:
    """A name as it stands in an export, whose own copy is read."""
    return Path(architecture).name if _IN_FILE.fullmatch(architecture) else architecture


def shown(architecture: str) -> str:
    """A name as a person reads it: of a file neither its folder nor all of its hash."""
    name, at, sha256 = without_folder(architecture).partition("@")
    return f"{name}{at}{sha256[:12]}"


def source(config: ModelConfig) -> tuple[str, bytes] | None:
    """Name and content of the file that a configuration's class was loaded from; None for ours."""
    module = sys.modules.get(type(config).__module__)
    if module is None or not hasattr(module, _SOURCE):
        return None
    file, content = getattr(module, _SOURCE)
    # Another file may have had the same content, and then its class is this one.
    return Path(parse(config.architecture).file or file).name, content


def is_of_file(module: str) -> bool:
    """Whether that is what the module of an architecture in a file is called."""
    return re.fullmatch(_module_name("[0-9a-f]{64}"), module) is not None


def load(named: Named, folders: Iterable[Path]) -> tuple[str, type[ModelConfig]]:
    """The class, and its name with the hash. It runs the file.

    Args:
        folders: of a run or an export, where a copy of the source may lie.

    Raises:
        ValueError: there is none, its source is not what it was, or it is not an architecture.
    """
    if named.file is None:
        return _load_installed(named)
    file, content = _find(named, Path(named.file), [folder / FOLDER / Path(named.file).name for folder in folders])
    sha256 = hashlib.sha256(content).hexdigest()
    module = sys.modules.get(_module_name(sha256)) or _run(file, content, sha256)
    return named._replace(sha256=sha256).pinned, _class_in(module, named.name, str(file))


def open_recorded(config: Recorded, folders: Iterable[Path]) -> ModelConfig:
    """The same keys in their class. Raises ConfigError as `load` raises ValueError."""
    named = parse(config.architecture)
    if named.sha256 is None:
        raise ConfigError(f"model.architecture={config.architecture}: without the hash of its source it is not run")
    try:
        pinned, chosen = load(named, folders)
        return chosen.model_validate(config.model_dump() | {"architecture": pinned})
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


@cache
def points() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of installed packages; looking for them takes longer than all else of a configuration."""
    return tuple(metadata.entry_points(group=GROUP))


def installed() -> dict[str, metadata.EntryPoint]:
    """The same by name."""
    return {point.name: point for point in points()}


_SOURCE = "__duet_source__"
"""Attribute of a module: its file and what is in it."""


def _module_name(sha256: str) -> str:
    return f"duet_architecture_{sha256}"


def _find(named: Named, original: Path, copies: list[Path]) -> tuple[Path, bytes]:
    """The file and its content: of the hash that is named, if one is."""
    seen = []
    for file in [*(copies if named.sha256 else ()), original]:
        try:
            content = file.read_bytes()
        except OSError as error:
            if file == original or file.exists():
                seen.append(f"{file}: {error.strerror or error}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if named.sha256 in (None, found):
            return file, content
        seen.append(f"{file}: has changed, its sha256 is {found[:12]}")
    if named.sha256 is None:
        raise ValueError(f"architecture: {seen[-1]}; FILE.py:{named.name} is a file and a class in it")
    raise ValueError(
        f"architecture: the source of {named.name} with sha256 {named.sha256[:12]}, as the run was begun with, is not "
        f"there: {'; '.join(seen)}; restore one of them, or begin a new run with the new source: "
        f"duet train --from RUN run.name=NEW model.architecture=FILE.py:{named.name}"
    )


def _run(file: Path, content: bytes, sha256: str) -> ModuleType:
    module = ModuleType(_module_name(sha256))
    module.__file__ = str(file)
    setattr(module, _SOURCE, (file, content))
    sys.modules[module.__name__] = module  # where pydantic and pickle look for its classes
    try:
        # These bytes, which were hashed; an import would read the file once more.
        exec(compile(content, str(file), "exec"), module.__dict__)  # noqa: S102 - the user has named it
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ValueError(f"architecture: {_explained(error, str(file))}") from error
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _explained(error: BaseException, file: str) -> str:
    """What went wrong at which line of the file."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f"{file}:{lines[-1]}" if lines else file
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return (
            f"{place}: needs torch, which is not here; a file that imports torch, and what does, in build() only is "
            "read on a login node, too"
        )
    return f"{place}: {type(error).__name__}: {error}"


def _load_installed(named: Named) -> tuple[str, type[ModelConfig]]:
    found = [point for point in points() if point.name == named.name]
    if not found:
        raise ValueError(f"architecture={named.name}: no installed package has it; install the one that did")
    if len({point.value for point in found}) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else point.value for point in found))
        raise ValueError(f"architecture={named.name}: several packages have it: {packages}; uninstall all but one")
    point = found[0]
    try:
        spec = util.find_spec(point.module)
        file = Path(spec.origin) if spec and spec.origin else None
        if file is None:
            raise ModuleNotFoundError(f"No module named {point.module!r}", name=point.module)
        content = file.read_bytes()
    except (ImportError, OSError) as error:
        raise ValueError(f"architecture={named.name}: {point.value}: {error}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if named.sha256 not in (None, sha256):
        raise ValueError(
            f"architecture={named.name}: {file} has changed: its sha256 is {sha256[:12]}, the run was begun with "
            f"{named.sha256[:12]}; install the package of then, or begin a new run with the new one: "
            f"duet train --from RUN run.name=NEW model.architecture={named.name}"
        )
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:
        raise ValueError(f"architecture={named.name}: {_explained(error, str(file))}") from error
    chosen = _checked(loaded, f"{file}: {point.attr}")
    if chosen.__module__ != point.module:  # its file is the one that was hashed
        raise ValueError(f"architecture={named.name}: {point.value} is defined in {chosen.__module__}; name it there")
    setattr(sys.modules[point.module], _SOURCE, (file, content))
    return named._replace(sha256=sha256).pinned, chosen


def _class_in(module: ModuleType, name: str, file: str) -> type[ModelConfig]:
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if _is_own(value, module)]
        raise ValueError(f"architecture: {file} has no {name}; there are: {', '.join(there) or 'no configurations'}")
    return _checked(getattr(module, name), f"{file}: {name}")


def _is_own(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, ModelConfig) and value.__module__ == module.__name__


def _checked(found: object, called: str) -> type[ModelConfig]:
    """Whether it is the configuration of an architecture. Raises ValueError."""
    if not (isinstance(found, type) and issubclass(found, ModelConfig)):
        raise ValueError(
            f"architecture: {called} is not a subclass of ModelConfig (model.config.model_config) or TransformerConfig "
            "(model.config.transformer)"
        )
    if not isinstance(getattr(found, "traits", None), Traits):
        raise ValueError(f"architecture: {called} has no `traits: ClassVar = Traits(…)` (model.config.model_config)")
    if unknown := {*found.traits.sites, *found.traits.default_sites} - {*get_args(Site)}:
        there = ", ".join(get_args(Site))
        raise ValueError(f"architecture: {called}: traits: no site is called {', '.join(unknown)}; there are {there}")
    if not callable(getattr(found, "build", None)):
        raise ValueError(f"architecture: {called} has no `build(self)` that returns a Backbone")
    if found.model_fields["architecture"].annotation is not str:
        raise ValueError(f"architecture: {called}.architecture: leave that field out; its value is the file's place")
    if not hasattr(found, "costs"):
        found.costs = measured.costs  # type: ignore[attr-defined]
    return found
