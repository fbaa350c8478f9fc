"""A trainer without torch for the tests of batch script and policy: `python -m tests.slurm.standin`, a rank.

Takes a step in 20 ms, has a checkpoint at each, and does what RUN_DIR/orders says: a JSON object of
{"die": {"rank", "step"}, "bug": {"rank", "step", "what"}, "mistake": "…", "deaf": true (to USR1), "steps": N}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pretrain.run.job_records import Heartbeat, JobFolder, Pulse, RankFailure, this_job
from pretrain.run.run_listing import saved_steps

USR1, TERM = signal.SIGUSR1, signal.SIGTERM


def main() -> int:
    """Train. The ranks wait for each other at the start only: each gets the signals itself."""
    seen: list[int] = []
    for number in (USR1, TERM):
        signal.signal(number, lambda got, _: seen.append(got))
    run_dir = Path(os.environ["RUN_DIR"])
    folder, rank, orders = (
        JobFolder(run_dir),
        int(os.environ["SLURM_PROCID"]),
        json.loads((run_dir / "orders").read_text()),
    )
    job, restart = this_job()
    start = step = max(saved_steps(run_dir), default=0)
    (run_dir / f"ready-{restart}-{rank}").touch()
    while not seen and len(list(run_dir.glob(f"ready-{restart}-*"))) < int(os.environ["SLURM_NTASKS"]):
        time.sleep(0.01)  # as the first collective waits: a rank without its handlers would die of a signal
    if rank == 0:
        shell = f"rank of the shell that submitted: {os.environ.get('RANK')}"
        print(f"resumed from {start}; {shell}; data {os.environ.get('DUET_DATA')}", flush=True)

    def fail(what: str, code: int, mistake: bool = False) -> int:
        node, samples = os.environ["SLURMD_NODENAME"], [8 * step, 8 * step + 7]
        folder.rank_failed(RankFailure(str(job), restart, rank, node, what, mistake, step, samples))
        return code

    while step < orders.get("steps", 10**9):
        step += 1
        bug = orders.get("bug", {})
        if bug.get("rank") == rank and start + bug["step"] == step:
            return fail(bug["what"].replace("RESTART", "x" * restart), 1)
        if orders.get("die", {}).get("rank") == rank and start + orders["die"]["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if "mistake" in orders:
            return fail(orders["mistake"], 2, mistake=True)
        time.sleep(0.02)
        if rank == 0 and "saves" in orders:
            (run_dir / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
            (run_dir / "checkpoints" / f"step-{step:09d}" / "manifest.json").touch()
        if rank == 0:
            Pulse(folder).beat(Heartbeat(step, 1, checkpoint=step))
        if seen and ("deaf" not in orders or TERM in seen):
            if rank == 0 and TERM not in seen:
                folder.request_requeue(step, trained=step - start)
            return 143 if TERM in seen else 0
        if folder.kill_switch.exists():
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
