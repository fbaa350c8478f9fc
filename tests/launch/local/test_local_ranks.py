"""Signals that come while ranks are being started."""

import subprocess
import sys

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
