"""What a configuration is stacked from: YAML files and presets, in the order given, then overrides. Each is a layer."""

import difflib
import json
import shlex
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.counts import count
from data_pipeline.errors import ConfigError
from data_pipeline.places import CHECKPOINT, DATASET, RUN, kind_of
from duet_pretrain import SOURCE
from model.architectures import external
from pretrain.config import yaml_files
from pretrain.config.keys import Keys, Kind

COMMAND_LINE = "command line"
_LENGTH = ("steps", "tokens")
"""Keys of `train` that say the same."""


class Layer(NamedTuple):
    """What one argument says."""

    name: str
    """The file, the preset or the override."""
    tree: dict[str, Any]

    @property
    def place(self) -> str:
        """What an error calls it: an override may hold a password."""
        return COMMAND_LINE if "=" in self.name else self.name

    def holds(self, location: list[str]) -> bool:
        """Whether it has something at a dotted place."""
        tree: Any = self.tree
        for part in location:
            if not isinstance(tree, dict) or part not in tree:
                return False
            tree = tree[part]
        return bool(location)


def read(args: list[str]) -> list[Layer]:
    """The layers that arguments name, the one that wins last.

    The `config.yaml` of a run folder means that folder, wherever it was moved; with `run.name=…`, a new run like it.

    Raises:
        ConfigError: a file that is not there or cannot be read.
    """
    _check_spaces(args)
    stack: list[Layer] = []
    for arg in sorted(args, key=lambda a: "=" in a and not is_file(a)):
        stack.append(Layer(arg, _placed(arg, _parse(arg))))
        if is_file(arg) and Path(arg).with_name("run.json").is_file():
            named = any(other.startswith("run.name=") for other in args)
            stack.append(Layer(arg, {"run": {"dir": None if named else str(Path(arg).parent)}}))
    return stack


def merged(stack: list[Layer]) -> dict[str, Any]:
    """What the layers say together.

    Raises:
        ConfigError: what one of them says cannot be resolved.
    """
    try:
        whole: Any = OmegaConf.to_container(OmegaConf.merge({}, *(layer.tree for layer in stack)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {error}") from error
    _later_length_wins(whole, stack)
    return whole


def spelt_out(value: Any, kind: Kind, keys: Keys) -> Any:
    """What was given for a key of this kind, with whole numbers such as 10M as numbers, and as a list what was given
    for a list without brackets. `true` for a number becomes a text, which is refused as one: it would be taken for 1.
    """
    if isinstance(value, dict) and get_origin(kind) is list:
        return spelt_out([value], kind, keys)
    if isinstance(value, dict):
        return {name: spelt_out(inner, keys.below(kind, str(name)), keys) for name, inner in value.items()}
    if isinstance(value, list):
        return [spelt_out(inner, keys.below(kind, str(place)), keys) for place, inner in enumerate(value)]
    if isinstance(value, bool) and _of_numbers(kind):
        return str(value).lower()
    if kind is int and isinstance(value, str):
        number = count(value)
        return value if number is None else number
    if get_origin(kind) is list and isinstance(value, str | int | float):
        return [value]
    return value


def _of_numbers(kind: Kind) -> bool:
    return kind in (int, float) or (get_origin(kind) is Literal and any(type(one) is int for one in get_args(kind)))


def sources(stack: list[Layer]) -> list[Path]:
    """Folders of runs that the files in the stack lie in: at the top, or in `slurm`."""
    files = [Path(layer.name).absolute() for layer in stack if is_file(layer.name)]
    return list(dict.fromkeys(folder for file in files for folder in file.parents[:2]))


def presets() -> list[str]:
    """Names of the shipped presets: `model/tiny`, `run/quickstart`, …; sites (`launch.slurm.site`) are none of them."""
    root = SOURCE / "configs"
    return sorted(
        f"{room.name}/{preset.name.removesuffix('.yaml')}"
        for room in root.iterdir()
        if room.is_dir() and room.name != "cluster"
        for preset in room.iterdir()
        if preset.name.endswith(".yaml")
    )


def is_file(arg: str) -> bool:
    """Whether an argument names a file."""
    try:
        return Path(arg).is_file()
    except (OSError, ValueError):  # an override may be longer than a name can be
        return False


def _later_length_wins(whole: dict[str, Any], stack: list[Layer]) -> None:
    """Of `train.steps` and `train.tokens`, which say the same, the layer that says it last has the say. All overrides
    are one layer here."""
    said: dict[str, int] = {}
    for number, layer in enumerate(stack):
        for key in _LENGTH:
            if layer.holds(["train", key]) and layer.tree["train"][key] is not None:
                said[key] = len(stack) if layer.place == COMMAND_LINE else number
    if len(said) == 2 and said["steps"] != said["tokens"]:
        whole["train"][min(said, key=said.__getitem__)] = None


def _placed(arg: str, tree: dict[str, Any]) -> dict[str, Any]:
    """What `arg` says, with the place of an architecture's file as seen from there."""
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(named := model.get("architecture"), str):
        model["architecture"] = external.absolute(named, Path(arg).parent if is_file(arg) else Path.cwd())
    return tree


def _parse(arg: str) -> dict[str, Any]:
    path = Path(arg)
    try:
        if is_file(arg):
            text = path.read_text(encoding="utf-8")
        elif "=" in arg:
            key, _, text = arg.partition("=")
            said = OmegaConf.create()
            OmegaConf.update(said, key, yaml_files.parse(text, key))
            return OmegaConf.to_container(said)  # type: ignore[return-value]
        elif arg in presets():
            text = (SOURCE / "configs" / f"{arg}.yaml").read_text(encoding="utf-8")
        else:
            raise ConfigError(f"{arg}: {_missing(arg)}")
        parsed = yaml_files.parse(text, arg)
        if told := _of_a_study(parsed, arg):
            raise ConfigError(f"{arg}: {told}")
        tree = OmegaConf.to_container(OmegaConf.create(parsed)) if isinstance(parsed, dict) else None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"{arg}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{arg}: expected keys and values, such as `train: {{steps: 100}}`")
    return {str(key): value for key, value in tree.items()}


def _of_a_study(content: Any, arg: str) -> str | None:
    """What is said of a file that tells of many runs (`pretrain.study`), by the keys that no run has."""
    for key, command in (("sections", "run"), ("sizes", "ladder")):
        if isinstance(content, dict) and {"config", key} <= content.keys():
            trained = shlex.join(["duet", "study", command, arg])
            return f"this is a study, and the configuration of one run is wanted; `{trained}` trains all of its runs"
    return None


def _missing(arg: str) -> str:
    """What is said of an argument that is no file, no preset and no override."""
    kind = kind_of(Path(arg))
    if kind == RUN:
        return f"a run folder, and a configuration is wanted; did you mean {Path(arg, 'config.yaml')}?"
    if kind == DATASET:
        return f"a dataset, and a configuration is wanted; did you mean data.path={arg}?"
    if kind == CHECKPOINT:
        return f"a checkpoint, and a configuration is wanted; did you mean {Path(arg).parent.parent / 'config.yaml'}?"
    if Path(arg).is_dir():
        return "a folder, and a YAML file, a preset or KEY=VALUE is wanted"
    if near := _near_presets(arg):
        return f"no such file or preset; did you mean {', '.join(near)}?"
    sections = json.loads((SOURCE / "configs" / "schema.json").read_bytes())["properties"]
    if "." in arg and arg.partition(".")[0] in sections:
        return f"no such file or preset; a key and its value are one word: {arg}=VALUE"
    return "no such file or preset, and no KEY=VALUE; `duet config presets` lists the presets"


def _near_presets(arg: str) -> list[str]:
    """At most three, by their whole name or by what stands behind the last `/`."""
    by_end = {name.rpartition("/")[2]: name for name in presets()}
    near = difflib.get_close_matches(arg, presets(), n=3)
    near += [by_end[end] for end in difflib.get_close_matches(arg.rpartition("/")[2], by_end, n=2)]
    return list(dict.fromkeys(near))[:3]


def _check_spaces(args: Iterable[str]) -> None:
    """Raises ConfigError for `KEY = VALUE`, which a shell takes for three arguments."""
    words = list(args)
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        spaced = after.startswith("=") or (word.endswith("=") and after and not _stands_alone(after))
        if spaced and not _stands_alone(word.removesuffix("=")):
            key = word.removesuffix("=")
            raise ConfigError(f"{COMMAND_LINE}: {key}: no spaces around `=`: write {key}=VALUE")


def _stands_alone(word: str) -> bool:
    return "=" in word or word in presets() or is_file(word)
