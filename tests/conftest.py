"""Fixtures for all rooms."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import warm
from tests.runs import CHARACTERS, MARKED, ROOT, build_dataset, program

SLOWEST = (
    *("test_docs.py", "test_end_to_end.py", "test_health.py", "test_study.py", "test_tracking_faults.py"),
    *("test_checkpoint.py", "test_pages.py", "test_drills.py", "test_golden.py", "test_objectives.py", "test_wheel.py"),
    "test_formats.py",
)
"""Files that take long. Begun first, so that no process has one of them left when the others are done."""

settings.load_profile("ci")  # seeded, and without deadlines: on a busy machine an example may stand still for seconds


def pytest_configure(config: pytest.Config) -> None:
    """What Hugging Face's libraries keep goes into a folder of this session, and they ask no server."""
    os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="duet-hf-"), "HF_HUB_OFFLINE": "1"}
    if not hasattr(config, "workerinput"):
        os.environ[warm.FOLDER] = tempfile.mkdtemp(prefix="duet-warm-")
        Path(os.environ[warm.FOLDER], "session").write_text(str(os.getpid()))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"])
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[warm.FOLDER])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


class RanksFailed(AssertionError):
    """A rank did not return; carries what the ranks printed."""


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """ranks("tests.distributed.cases:name", world, **args) -> the JSON result of every rank."""

    def run(target: str, world: int, timeout: float = 240, **args: Any) -> list[Any]:
        request = {"target": target, "world": world, "timeout": timeout, "args": args}
        done = program("tests.ranks", json.dumps(request), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        if "results" not in answer:
            raise RanksFailed(f"exit codes {answer['codes']}\n" + "\n".join(answer["outputs"]))
        return answer["results"]

    return run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character-level dataset of the licence's text."""
    return build_dataset(CHARACTERS, tmp_path_factory.mktemp("data") / "licence")


@pytest.fixture(scope="session")
def marked_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with the pieces that hide tokens."""
    return build_dataset(MARKED, tmp_path_factory.mktemp("data") / "marked")
