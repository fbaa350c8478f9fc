"""Fixtures for all rooms."""

import contextlib
import json
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import warm
from tests.runs import CHARACTERS, MARKED, ROOT, build_dataset

SLOWEST = (
    *("test_docs.py", "test_tracking_faults.py", "test_pages.py", "test_policy.py", "test_submit.py", "test_health.py"),
    *("test_end_to_end.py", "test_weighing.py", "test_checkpoint.py", "test_study.py", "test_names.py"),
    *("test_afterwards.py", "test_wheel.py", "test_drills.py", "test_golden.py", "test_engine.py"),
)
"""Files that take long. Begun first, so that no process has one of them left when the others are done."""

settings.load_profile("ci")  # seeded, and without deadlines: on a busy machine an example may stand still for seconds


def pytest_configure(config: pytest.Config) -> None:
    """What Hugging Face's libraries keep goes into the folder of this session, and they ask no server."""
    if not hasattr(config, "workerinput"):
        stack = contextlib.ExitStack()
        stack.enter_context(warm.session())
        config.add_cleanup(stack.close)
    os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="hf-", dir=os.environ[warm.FOLDER]), "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


GRACE = 30.0
"""Seconds for the other ranks to notice that one has failed; then they are ended."""


class RanksFailed(AssertionError):
    """A rank did not return; carries what the ranks printed."""


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """ranks("tests.distributed.cases:name", world, **args) -> the JSON result of each rank, None if it is `killed`."""

    def run(target: str, world: int, timeout: float = 240, killed: int | None = None, **args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="ranks-") as name, contextlib.ExitStack() as stack:
            results = [Path(name, f"{rank}.json") for rank in range(world)]
            logs = [stack.enter_context(open(Path(name, f"{rank}.log"), "w+b")) for rank in range(world)]
            nothing = stack.enter_context(open(os.devnull))
            shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
            shared["DUET_RENDEZVOUS"] = f"file://{name}/store"
            programs = [
                warm.start(
                    "tests.ranks",
                    [json.dumps({"target": target, "args": args, "result": str(result)})],
                    str(ROOT),
                    shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    [nothing.fileno(), log.fileno(), log.fileno()],
                )
                for rank, (result, log) in enumerate(zip(results, logs, strict=True))
            ]
            if killed is not None:
                stack.enter_context(programs.pop(killed))
                results.pop(killed)
            codes = _codes(programs, timeout)
            if any(codes):
                said = (Path(log.name).read_text(errors="replace") for log in logs)
                raise RanksFailed(f"exit codes {codes}\n" + "\n".join(said))
            found = [json.loads(result.read_text()) for result in results]
            return found if killed is None else [*found[:killed], None, *found[killed:]]

    return run


def _codes(programs: list[socket.socket], timeout: float) -> list[int]:
    """How each rank ended; those that outlive another's failure by GRACE seconds, or the timeout, are ended."""
    codes: dict[socket.socket, int] = {}
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        for program in programs:
            stack.enter_context(program)
        while left := [program for program in programs if program not in codes]:
            for program in select.select(left, [], [], max(0.0, end - time.monotonic()))[0]:
                codes[program] = warm.code_of(program)
                if codes[program]:
                    end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                for program in left:
                    codes.setdefault(program, -signal.SIGKILL)
        return [codes[program] for program in programs]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character-level dataset of the licence's text."""
    return build_dataset(CHARACTERS, tmp_path_factory.mktemp("data") / "licence")


@pytest.fixture(scope="session")
def marked_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with the pieces that hide tokens."""
    return build_dataset(MARKED, tmp_path_factory.mktemp("data") / "marked")
