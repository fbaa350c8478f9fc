"""A rank 0 without torch that writes what the trainer writes, by the same writers: `python -m tests.slurm.recorded`.

Takes a step in 50 ms and has a checkpoint at each tenth. `RUN_DIR/still` stops its steps, `RUN_DIR/end` ends it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from pretrain.run.job_records import Heartbeat, JobFolder, Pulse
from pretrain.run.journal import Journal
from pretrain.run.lease import Lease
from pretrain.run.run_listing import saved_steps


def main() -> int:
    """Until a signal, the kill switch, or the end; the other ranks have nothing to write."""
    stop: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda got, _: stop.append(got))
    run_dir, rank = Path(os.environ["RUN_DIR"]), int(os.environ.get("SLURM_PROCID", "0"))
    folder = JobFolder(run_dir)
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"rank-{rank}.log").write_text(f"words of rank {rank}\n")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    (logs / f"ready-{restart}-{rank}").touch()
    if rank:
        while not (stop or folder.kill_switch.exists() or (run_dir / "end").exists()):
            time.sleep(0.02)
        return 0
    with Lease.acquire(run_dir) as lease:
        start = step = max(saved_steps(run_dir), default=0)
        journal, pulse = Journal(run_dir / "metrics.jsonl", lease.attempt), Pulse(folder)
        journal.event("start", resumed_from=step or None)
        print(f"trains from step {step}", flush=True)
        while len(list(logs.glob(f"ready-{restart}-*"))) < int(os.environ["SLURM_NTASKS"]):
            time.sleep(0.02)  # as the first collective waits
        while not (stop or folder.kill_switch.exists() or (run_dir / "end").exists()):
            time.sleep(0.05)
            if not (run_dir / "still").exists():
                step += 1
                journal.metrics(step, {"loss/train": 5.0, "time/tokens_per_second": 1000.0})
                pulse.beat(Heartbeat(step, lease.attempt, 5.0, 1000.0))
                if step % 10 == 0:
                    save(run_dir, step)
        save(run_dir, step)
        done = not stop and not folder.kill_switch.exists()
        if stop[:1] == [signal.SIGUSR1]:
            folder.request_requeue(step, step - start)
        journal.event("end", status="FINISHED" if done else "KILLED", reason="told to")
        print(f"saved step {step}", flush=True)
    return 143 if stop[:1] == [signal.SIGTERM] else 0


def save(run_dir: Path, step: int) -> None:
    """A checkpoint, as far as a look from outside can tell."""
    path = run_dir / "checkpoints" / f"step-{step:09d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").touch()


if __name__ == "__main__":
    sys.exit(main())
