"""A corpus that is on every machine: the documentation inside Python's standard library.

Source files are parsed, never imported: nothing of them runs.
"""

import ast
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_TOPICS = "pydoc_data/topics.py"


def collect(path: Path) -> tuple[int, int]:
    """Writes JSON Lines ({"name", "text"}), zstd-compressed, to `path`, which appears only when it is whole.

    One document a documentation topic, then one a module: its docstrings in source order. Exact duplicates are left
    out. The order depends on names alone. Returns (documents, UTF-8 bytes of text).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    seen: set[str] = set()
    size = 0
    try:
        with open(temporary, "wb") as file:
            with zstandard.ZstdCompressor(level=9).stream_writer(file, closefd=False) as packed:
                for name, text in _documents(Path(sysconfig.get_path("stdlib"))):
                    if text and text not in seen:
                        seen.add(text)
                        size += len(text.encode())
                        packed.write((json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(seen), size


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    yield from _topics(library / _TOPICS)
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and relative.as_posix() != _TOPICS:
            yield relative.as_posix(), "\n\n".join(_docstrings(ast.parse(file.read_bytes(), str(file))))


def _topics(file: Path) -> Iterator[tuple[str, str]]:
    for statement in ast.parse(file.read_bytes(), str(file)).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                yield f"topic {name}", text.strip()


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)
