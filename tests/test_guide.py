"""What CONTRIBUTING tells the next owner is so: the picture, the ways through the house, where to begin, the words."""

import ast
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import ROOT
from tests.test_architecture import FILES, PACKAGES, imported_places, place
from tests.test_docs import DOCUMENTS

GUIDE = ROOT / "CONTRIBUTING.md"
OUTER = (*PACKAGES, "tests", "docs", "benchmarks", "configs", "slurm")
PATH = re.compile(rf"(?<![\w./-])(?:(?:{'|'.join(OUTER)})/[\w./-]*(?:\.(?:py|html)|/)|\.ci/)(?![\w.-])")
"""A file of code or a folder of the house: the run folder's own `slurm/…` are neither."""
OF_A_RUN_FOLDER = {"slurm/failures/"}
MODULE = re.compile(rf"-m ((?:{'|'.join(PACKAGES)}|tests)(?:\.\w+)+)")
SYMBOL = re.compile(r"`([\w/]+\.py)`: `(\w+)`|`(\w+)` in `([\w/]+\.py)`")
WAYS = {"sample": 14, "configuration key": 4, "metric": 8, "checkpoint": 8}
"""Files that each passes."""
BEGINNINGS = (
    *("an architecture", "an attention pattern", "a mask", "an objective", "a metric", "a configuration key"),
    *("an input format", "a field of a checkpoint", "a command", "a check of preflight", "a plot of the report"),
)
WORDS = (
    *("attempt", "backbone", "block", "fragment", "lease", "mask", "part", "phase", "site", "stream", "trait"),
    *("unit", "window"),
)


def section(title: str) -> str:
    """Of the guide."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE.read_text())
    assert found, title
    return found[1]


def rows(text: str) -> dict[str, str]:
    """Of a table: what is in the first column, and the rest."""
    cells = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells[1:]}


def names_of(file: Path) -> set[str]:
    """What a module defines at its top."""

    def named(node: ast.stmt) -> Iterator[str]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                yield target.id

    return {name for node in ast.parse(file.read_text()).body for name in named(node)}


def missing_paths(text: str) -> set[str]:
    return {path for path in PATH.findall(text) if path not in OF_A_RUN_FOLDER and not (ROOT / path).exists()}


def test_the_picture_shows_the_imports_of_today() -> None:
    house: dict[str, set[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            name = place(".".join(file.relative_to(ROOT).with_suffix("").parts))
            house.setdefault(name, set()).update(imported_places(file))
    with Image.open(ROOT / "docs" / "images" / "house.png") as picture:
        drawn = json.loads(picture.info["Description"])
        assert picture.width > 1000
    assert drawn == {name: sorted(house[name]) for name in sorted(house)}, "run: python docs/make_house.py"
    # All that is in it has a box, and what a room imports of its package lies below it.
    boxes = runpy.run_path(str(ROOT / "docs" / "make_house.py"))["Drawing"](drawn).boxes
    assert boxes.keys() == drawn.keys()
    assert len(set(boxes.values())) == len(boxes)
    for name, imported in drawn.items():
        for other in imported:
            assert other.split(".")[0] != name.split(".")[0] or boxes[other][1] < boxes[name][1], (name, other)


def test_the_tables_of_the_rooms_say_what_the_rooms_say() -> None:
    program = runpy.run_path(str(ROOT / "docs" / "make_house.py"))
    between = GUIDE.read_text().split(program["BEGIN"])[1].split(program["END"])[0]
    assert between == program["tables"](), "run: python docs/make_house.py"
    rooms = {f"`{file.parent.relative_to(ROOT)}/`" for file in FILES if len(file.relative_to(ROOT).parts) == 3}
    assert rooms <= {line.split(" | ")[0].strip("| ") for line in between.splitlines()}


def test_where_to_begin_is_there() -> None:
    table = rows(section("To change this, begin here"))
    assert tuple(table) == BEGINNINGS
    for change, rest in table.items():
        found = [(file or other, symbol or name) for file, symbol, name, other in SYMBOL.findall(rest)]
        assert found and rest.startswith(f"`{found[0][0]}`"), change
        for file, symbol in found:
            assert symbol in names_of(ROOT / file), f"{change}: {file} has no {symbol}"


@pytest.mark.parametrize("what", WAYS)
def test_the_ways_through_the_house_lead_over_files_that_are_there(what: str) -> None:
    steps = re.findall(r"(?m)^(\d+)\. (?:`([\w./]+)`)? ?(.*)$", section(f"The way of a {what}"))
    assert [int(number) for number, _, _ in steps] == list(range(1, WAYS[what] + 1))
    files = [file for _, file, _ in steps]
    assert len(set(files)) == len(files)
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_our_words_are_told() -> None:
    table = rows(section("Our words"))
    assert tuple(table) == WORDS
    defined = set().union(*map(names_of, FILES))
    classes = {name for text in table.values() for name in re.findall(r"`([A-Z]\w+)`", text)}
    assert len(classes) > 5
    assert classes <= defined


@pytest.mark.parametrize("document", [*DOCUMENTS, *sorted((ROOT / "benchmarks").glob("*.md"))], ids=lambda d: d.name)
def test_every_file_and_module_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    assert missing_paths(text) == set()
    modules = [ROOT / module.replace(".", "/") for module in MODULE.findall(text)]
    assert [str(module) for module in modules if not (module.is_dir() or module.with_suffix(".py").is_file())] == []


def test_a_path_that_is_gone_is_noticed() -> None:
    text = (
        "See `pretrain/config.py`, `data_pipeline/sampling/`, (pretrain/engines/) and `model/tiny` or runs/slurm/x.py."
    )
    assert missing_paths(text) == {"pretrain/config.py", "pretrain/engines/"}
