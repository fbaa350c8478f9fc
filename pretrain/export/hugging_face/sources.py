"""The code of an export: every file that the model's classes import, found from their imports, in one flat folder.

transformers copies the files that `from .NAME import` names, out of one folder. So `model/attention/cache.py` becomes
`model_attention_cache.py`, and each import of ours is written anew. In the place of two modules stand others: for
pydantic what checked values need (`plain_pydantic.py`), for the registry of architectures the one that the model has.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec, module_from_spec, resolve_name, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size

from data_pipeline.errors import CheckpointError
from model.architectures import external
from model.architectures.registry import Assembled
from model.config.model_config import ModelConfig
from pretrain.export.hugging_face import plain_pydantic

HERE = __name__.rpartition(".")[0]
ENTRY, LABELS, TOKENIZATION = "modeling_duet", "modeling_labels", "tokenization_duet"
_OURS = ("data_pipeline", "model", "pretrain")
_PLAIN = "plain_pydantic"
_REGISTRY = "model.architectures.registry"
_CHOSEN = '''"""The architecture of this model."""

from typing import Any

from model.architectures.token_model import TokenModel
from {module} import {name}


def configure(raw: dict[str, Any]) -> {name}:
    """The configuration that keys and values make."""
    return {name}.model_validate(raw)


def build(config: {name}) -> TokenModel:
    """A freshly initialised model."""
    return {built}
'''


class Code(NamedTuple):
    """What was found."""

    files: dict[str, str]
    """Content by name."""
    needs: tuple[str, ...]
    """Packages that an architecture of the user imports, beside torch and transformers."""


def sources(config: ModelConfig, entries: tuple[str, ...] = (ENTRY,)) -> Code:
    """All that `entries`, modules of this room, need to run a model of this configuration.

    Raises:
        CheckpointError: something of it cannot be copied; says which line.
    """
    kind = type(config)
    built = "config.assemble(config.build)" if isinstance(config, Assembled) else "TokenModel(config, config.build)"
    given = {_REGISTRY: _CHOSEN.format(module=kind.__module__, name=kind.__name__, built=built)}
    own = external.source(config)
    if own is not None:
        given[kind.__module__] = own[1].decode()
    found = _Copy((*_OURS, kind.__module__.partition(".")[0]), given)
    for name in entries:
        found.add(f"{HERE}.{name}")
    needs = found.needs - {"torch", "transformers", *sys.stdlib_module_names}
    if found.plain_is_enough:
        found.files[f"{_PLAIN}.py"] = Path(plain_pydantic.__file__).read_text()
        return Code(found.files, tuple(sorted(needs - {"pydantic"})))
    return Code({name: _with_pydantic(text) for name, text in found.files.items()}, tuple(sorted(needs)))


def check_alone(folder: Path, raw: dict[str, Any], shapes: Mapping[str, Size]) -> None:
    """Whether the code in a folder builds the model that `raw` describes. Raises CheckpointError."""
    name = f"_duet_export_{id(raw):x}"
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    sys.modules[name] = module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        chosen: Any = import_module(f"{name}.{_flat(_REGISTRY)}")
        with torch.device("meta"):
            found = chosen.build(chosen.configure(raw))
    except Exception as error:
        raise CheckpointError(
            f"the code of {raw['architecture']} does not run by itself: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.dont_write_bytecode = writes
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
    if {key: values.shape for key, values in found.named_parameters()} != shapes:
        raise CheckpointError(f"the code of {raw['architecture']} builds another model when it is read by itself")


class _Copy:
    """Follows imports, module by module."""

    def __init__(self, packages: tuple[str, ...], given: Mapping[str, str]) -> None:
        """`packages`: whose modules are copied; `given`: modules whose source is this and not that of a file."""
        self.files: dict[str, str] = {}
        self.needs: set[str] = set()
        self.plain_is_enough = True
        self._packages = packages
        self._given = given

    def add(self, module: str) -> None:
        """Copy a module and all that it imports."""
        file = f"{_flat(module)}.py"
        if file in self.files:
            return
        self.files[file] = ""  # imports may go in circles
        source = self._given.get(module) or _source(module)
        self.files[file] = self._rewritten(source, module)

    def _rewritten(self, source: str, module: str) -> str:
        lines = [line.encode() for line in source.splitlines(keepends=True)]  # columns count bytes
        statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in sorted(statements, key=lambda node: node.lineno, reverse=True):
            made = [*self._statements(node, module)]
            assert node.end_lineno is not None
            first, last = node.lineno - 1, node.end_lineno - 1
            before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            between = b"\n" + before if before.isspace() or not before else b"; "
            lines[first : last + 1] = [before + between.join(line.encode() for line in made) + after]
        return b"".join(lines).decode()

    def _statements(self, node: ast.Import | ast.ImportFrom, module: str) -> Iterator[str]:
        """What stands in the place of an import."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield self._imported(alias, f"{module}:{node.lineno}")
            return
        package = "." * node.level + (node.module or "")
        if node.level:
            package = resolve_name(package, module.rpartition(".")[0])
        if not self._is_copied(package):
            self._note(package, [alias.name for alias in node.names])
            name = f".{_PLAIN}" if package == "pydantic" else package
            yield f"from {name} import {', '.join(map(ast.unparse, node.names))}"
            return
        names = []
        for alias in node.names:
            inner = f"{package}.{alias.name}"
            if inner in self._given or (package not in self._given and _is_module(package, alias.name)):
                self.add(inner)
                flat = _flat(inner)
                # transformers sees no file in the second of these lines.
                yield f"from .{flat} import __name__ as _copied"
                yield f"from . import {flat} as {alias.asname or alias.name}"
            else:
                names.append(ast.unparse(alias))
        if names:
            self.add(package)
            yield f"from .{_flat(package)} import {', '.join(names)}"

    def _imported(self, alias: ast.alias, place: str) -> str:
        if self._is_copied(alias.name):
            raise CheckpointError(
                f"{place}: `import {alias.name}` cannot be copied into an export; write "
                f"`from {alias.name.rpartition('.')[0] or alias.name} import …`"
            )
        self._note(alias.name, ["*"])
        return f"import {ast.unparse(alias)}"

    def _is_copied(self, module: str) -> bool:
        return module in self._given or module.partition(".")[0] in self._packages

    def _note(self, module: str, names: list[str]) -> None:
        """That something of another package is needed."""
        package = module.partition(".")[0]
        if package == "pydantic":
            self.plain_is_enough &= module == package and set(names) <= set(plain_pydantic.__all__)
        self.needs.add(package)


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise CheckpointError(f"{module} has no source of Python to copy into an export")
    return Path(spec.origin).read_text()


def _is_module(package: str, name: str) -> bool:
    spec = find_spec(package)
    return bool(spec and spec.submodule_search_locations and find_spec(f"{package}.{name}"))


def _flat(module: str) -> str:
    """The name of a module in an export."""
    return "architecture" if external.is_of_file(module) else module.removeprefix(f"{HERE}.").replace(".", "_")


def _with_pydantic(text: str) -> str:
    return text.replace(f"from .{_PLAIN} import", "from pydantic import")
