"""A run without a model: lease, journal and mirror are the real ones, and each line of the input is a command.

`steps FIRST LAST`, `system NODE FIRST LAST`, `shipped`, `die` (SIGKILL in the middle of a line), `end STATUS TIMEOUT`.
Every answer is a line of JSON. The input's end is the writer's: SIGKILL, for a test that failed before its own end.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.tracking import follower
from pretrain.tracking.mlflow_state import State
from pretrain.tracking.mlflow_sync import Mirror

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "sqlite3.connect")


def values(step: int, attempt: int) -> dict[str, float]:
    return {
        "loss/train": 5.0 / step + attempt,
        "penalty/l1": 0.1 * step,
        "gate/density": 0.5,
        "gate/density/enc_ff/00": 0.5,
        "optim/grad_norm": math.inf if step % 50 == 3 else math.nan if step % 50 == 4 else 1.0 / step,
        "data/tokens_seen": 128.0 * step,
        "time/step_ms": 2.0,
    }


def main(run_dir: Path, attempt_config: dict[str, Any], uri: str | None, mode: str, resumed_from: int | None) -> None:
    """Until `die`, `end`, or the end of the input."""
    follower.POLL_SECONDS, follower.LONGEST_PAUSE_SECONDS = 0.05, 0.2
    callers: dict[str, set[str]] = {}

    def audit(event: str, _: Any) -> None:
        if event in NETWORK:
            callers.setdefault(event, set()).add(threading.current_thread().name)

    sys.addaudithook(audit)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "logs").mkdir(exist_ok=True)
    lease = Lease.acquire(run_dir)
    journal = Journal(run_dir / "metrics.jsonl", lease.attempt)
    journal.event("start", resumed_from=resumed_from, config=attempt_config, tags={"git/commit": f"c{lease.attempt}"})
    follower.assign(run_dir, uri=uri, experiment="duet", run_name=run_dir.name)
    tracker = follower.Tracker(partial(Mirror, run_dir), warn=lambda text: journal.event("warning", text=text))
    if mode == "online":
        tracker.start()
    answer(attempt=lease.attempt)
    nodes: dict[str, Journal] = {}
    for line in sys.stdin:
        command, *words = line.split()
        if command == "steps":
            for step in range(int(words[0]), int(words[1]) + 1):
                journal.metrics(step, values(step, lease.attempt))
                if step % 100 == 0:
                    journal.event("checkpoint", step=step, path=f"checkpoints/step-{step}")
                    journal.sync()
        elif command == "system":
            node = nodes.setdefault(words[0], Journal(run_dir / f"logs/system-{words[0]}.jsonl", lease.attempt))
            for step in range(int(words[1]), int(words[2]) + 1):
                node.metrics(step, {f"system/{words[0]}.cpu_percent": float(step), f"system/{words[0]}.load": 0.5})
        elif command == "shipped":
            wait_until_shipped(run_dir)
        elif command == "die":
            os.write(journal._descriptor, b'{"format": 1, "kind": "metrics", "step": 9')
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            journal.event("end", status=words[0], reason="as told")
            complete = tracker.close(float(words[1])) if mode == "online" else False
            journal.close()
            lease.release("as told")
            answer(complete=complete, callers={event: sorted(names) for event, names in callers.items()})
            return
        answer(done=line.strip())
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_shipped(run_dir: Path) -> None:
    """Until MLflow has said yes to all that is in the files now."""
    sizes = {str(f.relative_to(run_dir)): f.stat().st_size for f in run_dir.rglob("*.jsonl")}
    end = time.monotonic() + 60
    while True:
        state = State.load(run_dir)
        if state and all(state.offsets.get(name, 0) >= size for name, size in sizes.items()):
            return
        assert time.monotonic() < end, f"{state} of {sizes}"
        time.sleep(0.02)


def answer(**content: Any) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    folder, *rest = json.loads(sys.argv[1])
    main(Path(folder), *rest)
