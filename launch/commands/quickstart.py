"""The main job on text that is already on the machine: collect, tokenize, train, validate, report."""

import ast
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import typer
import zstandard


def run(folder: Path, ranks: int) -> int:
    """Do all steps below `folder`; each is skipped when it is done already.

    Returns:
        the exit code.
    """
    from data_pipeline.building.api import build
    from launch.local.local_ranks import run_ranks
    from launch.progress import progress_line
    from pretrain.config.schema import load

    corpus = folder / "data" / "python-docs.jsonl.zst"
    args = [
        "data/python-docs",
        "model/tiny",
        "run/quickstart",
        f"data.path={_quoted(folder / 'data' / 'python-docs')}",
        f"data.sources.python.paths=[{_quoted(corpus)}]",
        f"run.dir={_quoted(folder / 'runs' / 'quickstart')}",
    ]
    config = load(args)
    config.micro_batches(ranks)
    if not corpus.exists():
        typer.echo(f"1/3 collecting Python's own documentation into {corpus}")
        collect(corpus)
    typer.echo(f"2/3 tokenizer and shards in {config.data.path}")
    with progress_line() as progress:
        build(config.data, progress)
    typer.echo(f"3/3 training on {ranks} ranks: ZeRO {config.engine.zero_stage}, {config.train.steps} steps")
    return run_ranks(args, ranks, config.run_dir / "logs")


def _quoted(path: Path) -> str:
    """A path in an override, whatever is in its name."""
    return json.dumps(str(path), ensure_ascii=False)


_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_TOPICS = "pydoc_data/topics.py"
_FEWEST_WORDS = 8
_PLAIN = re.compile(r"[^\W\d_]|[ .,;:'\"()-]")
_PLAIN_SHARE = 0.99


def collect(path: Path) -> tuple[int, int]:
    """Writes JSON Lines ({"name", "text"}), zstd-compressed, to `path`, which appears only when it is whole.

    One document a documentation topic, then one a module: the prose of its docstrings in source order, each paragraph
    once and on one line. So a small model soon writes what reads like it, which tables and code would keep it from.
    The order depends on names alone. Returns (documents, UTF-8 bytes of text).
    """
    from data_pipeline.files.atomic import named

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    seen: set[str] = set()
    documents = size = 0
    try:
        with named(path), open(temporary, "wb") as file:
            with zstandard.ZstdCompressor(level=9).stream_writer(file, closefd=False) as packed:
                for name, raw in _documents(Path(sysconfig.get_path("stdlib"))):
                    new = [one for one in dict.fromkeys(paragraphs(raw)) if one not in seen]
                    if text := "\n\n".join(new):
                        seen.update(new)
                        documents += 1
                        size += len(text.encode())
                        packed.write((json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return documents, size


def paragraphs(text: str) -> Iterator[str]:
    """Those of prose, each on one line: sentences of words, without code, tables and lists of names."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        is_sentence = len(line.split()) >= _FEWEST_WORDS and line[0].isupper() and line[-1] in ".:"
        if is_sentence and "()" not in line and len(_PLAIN.findall(line)) >= _PLAIN_SHARE * len(line):
            yield line


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
