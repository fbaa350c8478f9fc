"""The rules of the house: who may import whom, and what a login node must not need."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "model", "pretrain", "launch")
MAY_IMPORT = {
    "data_pipeline": {"data_pipeline"},
    "model": {"model", "data_pipeline.errors", "data_pipeline.may_change"},
    "pretrain": {"pretrain", "model", "data_pipeline"},
    "launch": {"launch", "pretrain", "model", "data_pipeline"},
}
ONLY_IN = {
    "deepspeed": ("pretrain/engine/engine.py", "pretrain/engine/sequence.py"),
    "mlflow": ("pretrain/tracking/mlflow_sync.py", "pretrain/tracking/mlflow_store.py"),
    "transformers": ("pretrain/export/hugging_face/",),
    "lm_eval": ("pretrain/export/harness.py",),
    "pyarrow": ("data_pipeline/",),
    "sentencepiece": ("data_pipeline/",),
}
MOST_FILES = 12
"""In a room, `__init__.py` aside."""
MOST_LINES = 50
"""Of a function; of a command without its signature, which is a table of options."""
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
ROOMS = sorted({file.parent for file in FILES})


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module: str) -> str:
    """The room that a module of ours is in, or the file itself where it stands in no inner room."""
    return ".".join(module.split(".")[:2])


def imported_places(file: Path) -> set[str]:
    """Of other places of ours that a file imports."""
    found = {place(name) for name in imports(file) if name.split(".")[0] in PACKAGES and "." in name}
    return found - {place(".".join(file.relative_to(ROOT).with_suffix("").parts))}


def allowed(room: Path) -> set[str]:
    """What the second sentence of a room's `__init__.py` lets it import."""
    text = " ".join((ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").split())
    owns, _, may = text.partition(" May import: ")
    assert owns, room
    assert may.endswith("."), f"{room}: says what it owns, then 'May import: ….'"
    return set(may[:-1].split(", "))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_keep_to_the_rules(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    package = name.split("/")[0]
    for imported in imports(file):
        top = imported.split(".")[0]
        if top in PACKAGES and imported != top:
            known = MAY_IMPORT[package]
            assert top in known or any(imported == a or imported.startswith(f"{a}.") for a in known), (
                f"{name} imports {imported}"
            )
        for library, places in ONLY_IN.items():
            if top == library:
                assert name.startswith(places), f"{name} imports {library}; only {places} may"
    if file.parent.parent != ROOT:
        beyond = imported_places(file) - allowed(file.parent)
        assert not beyond, f"{name} imports {', '.join(beyond)}, which the room's __init__.py does not name"


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            graph.setdefault(place(".".join(file.relative_to(ROOT).with_suffix("").parts)), set()).update(
                imported_places(file)
            )
    assert len(graph) > 30
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("room", ROOMS, ids=lambda r: str(r.relative_to(ROOT)))
def test_rooms_stay_small(room: Path) -> None:
    files = [file.name for file in room.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= MOST_FILES, f"{len(files)} files: {files}"
    _, *does = ast.parse((room / "__init__.py").read_text()).body
    if room.parent == ROOT:
        does = [node for node in does if "duet_pretrain" not in ast.unparse(node)]
    assert not does, "a room's __init__.py says what it owns, and does nothing; a package's asks whether names are ours"


def test_the_rules_see_a_breach(tmp_path: Path) -> None:
    breach = tmp_path / "breach.py"
    breach.write_text("def f():\n    from pretrain import engine\n    import deepspeed.comm\n")
    assert {"pretrain", "pretrain.engine", "deepspeed.comm"} <= set(imports(breach))
    [function] = ast.parse(breach.read_text()).body
    assert isinstance(function, ast.FunctionDef)
    assert lines_of(function) == 3
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_login_node_commands_need_no_heavy_library() -> None:
    commands = """--help / train --help / data build --help / checkpoint ls --help / preflight --help / submit --help
        / status --help / logs --help / cancel --help / resume --help / model params --help / status .
        / config show model/tiny / config presets / model flops model/tiny model.vocab_size=512
        / plan model/tiny model.vocab_size=512 --gpus 2 --gpu h100"""
    words = [command.split() for command in commands.split(" / ")]
    program = f"""
import sys
for name in ("torch", "mlflow", "pyarrow", "deepspeed", "sentencepiece", "matplotlib", "transformers", "lm_eval"):
    sys.modules[name] = None
from launch.cli import main
for words in {words!r}:
    sys.argv = ["duet", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
    print("the end")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("the end\n")
    assert len(said) == len(words) + 1 and all(said[:-1])


def test_commands_that_read_a_checkpoint_load_neither_compiler_nor_engine() -> None:
    """Each takes longer to import than all else that they need."""
    program = "import sys, pretrain.inference.continuation, pretrain.export.portable, launch.commands.checkpoint\n"
    program += "assert 'torch' in sys.modules\nassert not {'torch._dynamo', 'deepspeed'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert len(places) > 200
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_files_stay_readable() -> None:
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > 420}
    assert not long, f"one idea a file, about 400 lines: {long}"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Docstring included."""
    is_command = "typer." in ast.unparse(function.args)
    first = function.body[0].lineno if is_command else function.lineno
    return (function.end_lineno or 0) - first + 1


def test_functions_stay_readable() -> None:
    long = {
        f"{file.relative_to(ROOT)}: {node.name}": lines_of(node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > MOST_LINES
    }
    assert not long


def test_a_path_in_a_command_that_is_printed_is_quoted_for_a_shell() -> None:
    """`duet resume {run}` would break at a space, and do worse at `$(…)`."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                elif isinstance(part, ast.FormattedValue):
                    command = re.search(r"(duet [a-z]+|mlflow ui)( [^`;,()]*)? $", before)
                    shown = ast.unparse(part.value)
                    if command and not re.match(r"(shlex\.)?(quote|shown|join)\(|_command\(", shown):
                        found.append(f"{file.relative_to(ROOT)}:{part.lineno}: {command[0]}{{{shown}}}")
                    before += "x"
    assert found == []
