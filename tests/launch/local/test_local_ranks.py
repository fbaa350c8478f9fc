"""Signals that come while ranks are being started, and ranks that end together."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local.local_ranks import _wait

RANK = """
import os, sys, time
from pretrain.run.signals import StopRequest, exit_code
stop, launcher = StopRequest(), os.getppid()
while not stop.signal and os.getppid() == launcher:
    time.sleep(0.01)
sys.exit(exit_code(stop.signal))
"""
LAUNCHER = f"""
import os, signal, subprocess, sys
from pathlib import Path
from launch.local import local_ranks

def start(rank, *_):
    if rank == 0:
        os.kill(os.getpid(), number)
    return subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)

local_ranks._start = start
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    print(local_ranks.run_ranks([], 2, Path("nowhere/logs")), flush=True)
"""


def test_a_signal_that_comes_before_a_rank_can_hear_it_reaches_it_all_the_same() -> None:
    """Neither lost, nor the end of Python in the middle of its start."""
    launcher = [sys.executable, "-c", LAUNCHER]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    assert done.stdout.split() == ["143", "130", "0"], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ends", "code", "named"),
    [
        (["exit 1", "kill -9 $$"], 128 + signal.SIGKILL, "rank 1 ended with code -9"),
        (["kill -9 $$", "exit 1"], 128 + signal.SIGKILL, "rank 0 ended with code -9"),
        (["exit 1", "exit 0", "exit 1"], 1, "rank 2 ended with code 1"),
        (["exit 2", "exit 2"], 2, None),
        (["exit 1", "exit 0"], 1, None),
        (["exit 0", "exit 0"], 0, None),
    ],
)
def test_of_ranks_that_are_found_dead_together_the_cause_is_named(
    ends: list[str], code: int, named: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a busy machine rank 0, which loses a dead rank's connection, is gone by the next look, too."""
    processes = [subprocess.Popen(["sh", "-c", end]) for end in ends]
    for process in processes:
        process.wait()
    assert _wait(processes, tmp_path / "logs") == code
    said = capsys.readouterr().err
    assert (f"error: {named};" in said) if named else not said
