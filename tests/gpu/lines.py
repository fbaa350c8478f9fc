"""Lines of ours that run on CUDA alone, found in the source, and which of them a process has reached.

A statement is one if it stands where a condition says CUDA: in the body of `if device.type == "cuda"`, in the `else` of
its opposite, or after an opposite that returns; or in a function whose first line ends in `# CUDA only`. Conditional
expressions (`"nccl" if cuda else "gloo"`) share their line with the CPU and are not counted.
"""

import ast
import hashlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from tests.gpu.setting import ROOT

PACKAGES = ("data_pipeline", "launch", "model", "pretrain")
WORDS = {"cuda", "_cuda", "is_cuda", "in_blocks"}
MARK = "# CUDA only"
Lines = dict[str, dict[int, int]]
"""By file, relative to the root: the first and the last line of each statement."""


def cuda_only() -> Lines:
    """All of the project."""
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    found = {str(file.relative_to(ROOT)): of_source(file.read_text()) for file in files}
    return {file: lines for file, lines in found.items() if lines}


def of_source(text: str) -> dict[int, int]:
    lines = text.splitlines()
    found: dict[int, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and lines[node.lineno - 1].endswith(MARK):
            found |= _statements(node.body[1:] if ast.get_docstring(node) else node.body)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                found |= _of_block(block)
    return dict(sorted(found.items()))


def _of_block(block: Sequence[ast.stmt]) -> dict[int, int]:
    found: dict[int, int] = {}
    for number, statement in enumerate(block):
        if not isinstance(statement, ast.If):
            continue
        says = _says_cuda(statement.test)
        if says:
            found |= _statements(statement.body)
        elif says is False:
            found |= _statements(statement.orelse)
            if isinstance(statement.body[-1], ast.Return | ast.Raise):
                found |= _statements(block[number + 1 :])
    return found


def _says_cuda(test: ast.expr) -> bool | None:
    """True where it holds on CUDA alone, False where everywhere else, None where it says neither."""
    if isinstance(test, ast.BoolOp):
        return True if isinstance(test.op, ast.And) and True in map(_says_cuda, test.values) else None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        says = _says_cuda(test.operand)
        return None if says is None else not says
    if isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
        if test.comparators[0].value != "cuda":
            return None
        return isinstance(test.ops[0], ast.Eq)
    if isinstance(test, ast.Call):
        return True if ast.unparse(test) == "torch.cuda.is_available()" else None
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else None
    return True if name in WORDS else None


def _statements(block: Iterable[ast.stmt]) -> dict[int, int]:
    """Simple ones by all their lines, the others by their head; functions inside by what they hold."""
    found: dict[int, int] = {}
    for statement in block:
        inner = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        whole = not any(inner)
        found[statement.lineno] = (statement.end_lineno or statement.lineno) if whole else statement.lineno
        for part in inner:
            found |= _statements(part)
    return found


class Tracer:
    """Notes, as a context, which lines of these files this process reaches, in all its threads begun meanwhile."""

    def __init__(self, wanted: Lines) -> None:
        self._names = {str(ROOT / file): file for file in wanted}
        self.reached: dict[str, set[int]] = {file: set() for file in wanted}

    def __enter__(self) -> "Tracer":
        if sys.version_info >= (3, 12):
            monitoring: Any = sys.monitoring
            monitoring.use_tool_id(monitoring.COVERAGE_ID, "duet")
            monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._line)
            monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
        else:
            threading.settrace(self._call)
            sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        if sys.version_info >= (3, 12):
            monitoring: Any = sys.monitoring
            monitoring.set_events(monitoring.COVERAGE_ID, 0)
            monitoring.free_tool_id(monitoring.COVERAGE_ID)
        else:
            sys.settrace(None)
            threading.settrace(None)

    def _line(self, code: CodeType, line: int) -> Any:
        if file := self._names.get(code.co_filename):
            self.reached[file].add(line)
        monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
        return monitoring.DISABLE  # once is enough

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Lines are traced in these files alone; elsewhere a call costs a look."""
        file = self._names.get(frame.f_code.co_filename)
        if file is None:
            return None
        reached = self.reached[file]

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            reached.add(frame.f_lineno)
            return local

        return local


def named(file: str) -> str:
    """A file with a hash of what it holds: lines that were reached in another version of it say nothing."""
    return f"{file} {hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]}"


def missed(wanted: Lines, reached: dict[str, set[int]]) -> Iterator[str]:
    """`file:line: source` of each statement that was not reached."""
    for file, statements in wanted.items():
        lines = (ROOT / file).read_text().splitlines()
        for first, last in statements.items():
            if not reached.get(file, set()) & set(range(first, last + 1)):
                yield f"{file}:{first}: {lines[first - 1].strip()}"
