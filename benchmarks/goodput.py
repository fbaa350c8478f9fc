"""Goodput of a simulated run through a million node-hours of failures: events are simulated, decisions are not.

What decides is the code of a real run, with its files: `launch.slurm.policy`, who owns the folder, which checkpoints
stay, which nodes are avoided. The clock, Slurm and the faults are simulated; each scenario is seeded. The formula is
that of `pretrain/planning/goodput.py`. Exits with 1 when a target is missed.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from launch.slurm import policy
from launch.slurm.exclude import AVOIDED_SECONDS, exclude, to_avoid
from launch.slurm.policy import Action
from pretrain.checkpoint.manifest import CheckpointManifest, CheckpointShard
from pretrain.checkpoint.retention import prune
from pretrain.planning.goodput import GPU_HOURS, Times, best_interval, expected
from pretrain.run.checkpoint_folder import MANIFEST, complete, step_of, step_path
from pretrain.run.job_records import Heartbeat, JobFolder, Pulse, RankFailure
from pretrain.run.lease import Lease

HOUR = 3600.0
GPUS_PER_NODE = 8
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where the runs lie: a disk takes most of the time to say that something is on it."""
STEP = 5.0
"""Seconds of training."""
BATCH_SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "pretrain.sbatch"
ASKED = int(re.findall(r"for try in \{1\.\.(\d+)\}; do  # a controller", BATCH_SCRIPT.read_text())[0]) * 10.0
"""For how many seconds the batch script asks a controller that does not answer to requeue the job."""
MEASURED = Times(save=0.022, store=2.6, load=1.9, start=17.0, requeue=120.0, detect=10.7)
"""benchmarks/checkpoint.md (303 M parameters on one disk) and docs/fault-tolerance.md (the drill on a real Slurm), but
for Slurm's own wait, which that drill cuts short. One rank's share of a checkpoint is smaller on any cluster."""
KINDS = {
    # what happens: (share of the interruptions, seconds until all processes have ended)
    "crash": (0.55, 10.0),
    "killed": (0.15, 10.0),
    "hang": (0.10, 600.0),
    "bad node": (0.12, 10.0),
    "preempted": (0.08, 30.0),
}
WORDS = (
    "RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "DistBackendError: NCCL error in: remote process exited or there was a network error",
    "RuntimeError: CUDA error: unspecified launch failure",
    "OSError: [Errno 5] Input/output error",
)


@dataclass
class Scenario:
    """A run, and what befalls it."""

    name: str
    nodes: int
    hours: float
    """Of wall time; at least."""
    times: Times
    mixed: bool = False
    """All kinds of faults; else crashes only, as the formula has them."""
    slow_leave: bool = False
    """A node that was slow during a whole start is left out of the next, which no code of ours does: what that were
    worth, within the caps on nodes to avoid."""
    keep: int = 3
    seed: int = 1
    interval: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds between interruptions at the published rate."""
        return GPU_HOURS / (self.nodes * GPUS_PER_NODE) * HOUR


@dataclass
class Outcome:
    """What became of a run."""

    scenario: Scenario
    wall: float = 0.0
    useful: float = 0.0
    causes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds that did not train what counts, by their cause."""
    faults: Counter[str] = field(default_factory=Counter)
    lost: str = ""
    """Why the run was over before its time."""
    most_kept: int = 0
    """Checkpoints on disk at a time."""
    longest_avoided: float = 0.0
    """Seconds for which a node was left out at a time, after it had been mended."""


class Clock:
    """Simulated seconds since the epoch, for everything that asks `time.time`."""

    def __init__(self) -> None:
        self.now = 1.8e9

    def __call__(self) -> float:
        """As `time.time`."""
        return self.now


class Run:
    """One job on a simulated cluster, from its submission until its time is over, or it is lost."""

    def __init__(self, scenario: Scenario, root: Path, clock: Clock) -> None:
        self._scenario, self._clock = scenario, clock
        self._random = random.Random(scenario.seed)
        self._dir, self._log = root / "run", root / "job.log"
        self._dir.mkdir()
        self._folder = JobFolder(self._dir)
        self._folder.path.mkdir()
        self._pulse = Pulse(self._folder)
        self._restart = 0
        self._step = 0
        """Of the newest checkpoint that counts."""
        self._pool = [f"n{number:04d}" for number in range(scenario.nodes + max(4, scenario.nodes // 50))]
        self._bad: dict[str, float] = {}
        """Until when a node does not start its tasks."""
        self._slow: dict[str, float] = {}
        self._avoid: set[str] = set()
        self._outage = (0.0, 0.0)
        self._plan_outage()
        self.outcome = Outcome(scenario)

    def through(self) -> Outcome:
        """All starts."""
        started, scenario, out = self._clock.now, self._scenario, self.outcome
        over = started + scenario.hours * HOUR
        self._clock.now += scenario.times.start + scenario.times.load
        out.causes["start, load"] += scenario.times.start + scenario.times.load
        while self._clock.now < over and not out.lost:
            self._one_start(over)
            self._restart += 1
        out.wall = self._clock.now - started
        return out

    def _one_start(self, over: float) -> None:
        os.environ["SLURM_RESTART_COUNT"] = str(self._restart)
        nodes = self._allocated()
        self._log.write_text(f"job 7 restart {self._restart}: start on {' '.join(nodes[:2])}\n")
        lease = Lease.acquire(self._dir)
        lease._stop.set()  # it dies with the start, not with this process; nothing is released
        bad = [node for node in nodes if self._bad.get(node, 0) > self._clock.now]
        if bad:
            words = "srun: error: Task launch for StepId=7.0 failed on node {}: Communication connection failure"
            self._end(policy.LAUNCH_FAILED, "none", "\n".join(map(words.format, bad)))
        else:
            self._train(nodes, over)

    def _train(self, nodes: list[str], over: float) -> None:
        """From the newest checkpoint to the next fault, all saves in between."""
        scenario, out = self._scenario, self.outcome
        alive = self._random.expovariate(1 / scenario.mean)
        last = self._clock.now + alive >= over  # its time is over before: it saves, and nothing is lost
        alive = min(alive, over - self._clock.now)
        slow_ones = [node for node in nodes if self._slow.get(node, 0) > self._clock.now]
        slow = 1.4 if slow_ones else 1.0
        work, save = scenario.interval * slow, scenario.times.save
        begun, first = self._clock.now, self._step
        steps = round(scenario.interval / STEP)
        # The checkpoint of a cycle counts `store` seconds after it.
        saved = max(0, int((alive - scenario.times.store) / (work + save)))
        for cycle in range(max(1, saved - scenario.keep - 2), saved + 1):  # the earlier ones are gone by then
            self._clock.now = begun + cycle * (work + save) + scenario.times.store
            self._save(first + cycle * steps)
        self._clock.now = begun + alive
        rest = alive - saved * (work + save)
        out.useful += saved * scenario.interval + (rest / slow if last else 0)
        out.causes["saving"] += saved * save
        out.causes["slow nodes"] += saved * (work - scenario.interval) + (rest - rest / slow if last else 0)
        out.causes["steps taken again"] += 0 if last else rest
        reached = first + int(alive / (work + save) * steps)
        if self._scenario.slow_leave:
            self._leave_out([node for node in slow_ones if self._slow[node] > self._clock.now])
        if not last:
            self._fault(nodes, reached)

    def _leave_out(self, slow: list[str]) -> None:
        for node in slow:
            if not exclude(self._folder, {node: "slow"}, self._scenario.nodes):
                self.outcome.faults["slow nodes left out"] += 1

    def _fault(self, nodes: list[str], reached: int) -> None:
        scenario, out, draw = self._scenario, self.outcome, self._random
        kind = draw.choices([*KINDS], [share for share, _ in KINDS.values()])[0] if scenario.mixed else "crash"
        seconds = KINDS[kind][1] if scenario.mixed else scenario.times.detect
        out.faults[kind] += 1
        self._down(seconds, "noticing")
        host = draw.choice(nodes)
        rank = nodes.index(host) * GPUS_PER_NODE + draw.randrange(GPUS_PER_NODE)
        self._pulse.rested()
        self._pulse.beat(Heartbeat(reached, self._restart + 1, job="7", restart=self._restart))
        if kind == "preempted":
            self._end(143, "TERM", "")
        elif kind == "killed":
            self._end(137, "none", f"srun: error: {host}: task {rank}: Killed")
        else:
            self._told(kind, host, rank, reached)
            self._end(1, "none", "")

    def _told(self, kind: str, host: str, rank: int, reached: int) -> None:
        """Ranks write down why they ended; the node stays bad, or slow, for a while."""
        draw = self._random
        if kind == "bad node":
            self._bad[host] = self._clock.now + draw.uniform(6, 72) * HOUR
        elif self._scenario.mixed and draw.random() < 0.1:  # it goes on, and is slow from now on
            self._slow[host] = self._clock.now + draw.uniform(6, 48) * HOUR
        what = "WatchdogError: no progress for 600 s" if kind == "hang" else draw.choice(WORDS)
        for late in range(3):  # some others of the ranks tell of it, too
            when = self._clock.now + late
            failure = RankFailure("7", self._restart, rank + late, host, what, False, reached + 1, [1, 2], when)
            self._folder.rank_failed(failure)

    def _end(self, rc: int, signal: str, words: str) -> None:
        """What the batch script does when srun has returned."""
        out, times = self.outcome, self._scenario.times
        with open(self._log, "a") as log:
            log.write(words + "\n")
        before = {record["node"] for record in self._folder.excluded()}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            action = policy.main([str(self._dir), f"--rc={rc}", f"--signal={signal}", f"--log={self._log}"])
        if signal == "TERM":
            out.faults["requeued by Slurm"] += 1
        elif action not in (Action.REQUEUE, Action.REQUEUE_AVOIDING):
            out.lost = said.getvalue().strip()
            return
        else:
            out.faults["nodes excluded"] += len({record["node"] for record in self._folder.excluded()} - before)
            self._avoid = to_avoid(self._folder, self._avoid)
        if rc == policy.LAUNCH_FAILED:
            out.faults["launches in vain"] += 1
        self._wait_for_controller()
        self._down(times.requeue, "requeue")
        self._down(times.start, "start, load")
        self._down(times.load, "start, load")

    def _allocated(self) -> list[str]:
        """The nodes that Slurm gives: not those to avoid, the rest in order."""
        for node in self._avoid:
            waited = self._clock.now - max(self._bad.get(node, 0.0), self._excluded_at(node) + AVOIDED_SECONDS)
            self.outcome.longest_avoided = max(self.outcome.longest_avoided, waited)
        return [node for node in self._pool if node not in self._avoid][: self._scenario.nodes]

    def _excluded_at(self, node: str) -> float:
        return next(record["time"] for record in self._folder.excluded() if record["node"] == node)

    def _down(self, seconds: float, cause: str) -> None:
        """Time goes by; a restart is interrupted as often as training, and then begins anew."""
        out, mean = self.outcome, self._scenario.mean
        while (until := self._random.expovariate(1 / mean)) < seconds:
            self._clock.now += until
            out.causes[cause] += until
            out.faults["interrupted while down"] += 1
        self._clock.now += seconds
        out.causes[cause] += seconds

    def _wait_for_controller(self) -> None:
        """The batch script asks it every ten seconds."""
        begins, ends = self._outage
        if self._clock.now < begins:
            return
        waited = max(0.0, math.ceil((ends - self._clock.now) / 10) * 10)
        if waited > ASKED:
            self.outcome.lost = f"the controller was away for {waited:.0f} s more, and was asked for {ASKED:.0f}"
        self.outcome.faults["controller away"] += waited > 0
        self._clock.now += waited
        self.outcome.causes["controller away"] += waited
        self._plan_outage()

    def _plan_outage(self) -> None:
        """The next time that the controller does not answer: once a day, mostly minutes, at most half an hour."""
        if not self._scenario.mixed:
            self._outage = (math.inf, math.inf)
            return
        begins = self._clock.now + self._random.expovariate(1 / (24 * HOUR))
        self._outage = (begins, begins + min(1800.0, self._random.lognormvariate(math.log(300), 1)))

    def _save(self, step: int) -> None:
        """A checkpoint counts from now on, and older ones go."""
        self._step = step
        root = self._dir / "checkpoints"
        path = step_path(root, step)
        path.mkdir(parents=True)
        shard = CheckpointShard(file="shard-00000.safetensors", bytes=1, xxh3_128="0" * 32, fragments=[("w", 0, 1)])
        (path / shard.file).write_bytes(b"0")
        content = CheckpointManifest(
            step=step,
            optimizer_steps=step,
            world_size=1,
            zero_stage=1,
            shapes={"w": [1]},
            states={"w": ("fp32",)},
            shards=[shard],
            state={"run": "simulated"},
            saved=self._clock.now,
        )
        (path / MANIFEST).write_text(content.sealed())
        prune(root, self._scenario.keep, None, "simulated", step)
        kept = complete(root)
        assert step_of(kept[0]) == step
        self.outcome.most_kept = max(self.outcome.most_kept, len(kept))


@contextlib.contextmanager
def simulated(clock: Clock) -> Iterator[Path]:
    """A folder for a run, and what a job's processes see: its number, the clock."""
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        mock.patch.dict(os.environ, job),
        mock.patch.object(time, "time", clock),
    ):
        yield Path(folder)


def simulate(scenario: Scenario) -> Outcome:
    """The run of a scenario."""
    scenario.interval = max(STEP, round(best_interval(scenario.mean, scenario.times.save) / STEP) * STEP)
    clock = Clock()
    os.environ["SLURM_JOB_NUM_NODES"] = str(scenario.nodes)
    with simulated(clock) as root:
        return Run(scenario, root, clock).through()


def row(name: str, ratio: float, target: float, **more: Any) -> dict[str, Any]:
    """One claim; met when the ratio is at most the target."""
    return {"name": name, "ratio": ratio, "target": target, **more}


def main() -> int:
    """Simulate, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    slow = Times(save=2.0, store=60.0, load=60.0, detect=10.0)
    formula = [
        simulate(Scenario(f"{nodes:,} nodes", nodes, hours, slow)) for nodes, hours in ((512, 2000), (2048, 500))
    ]
    mixed = [
        simulate(Scenario(f"all faults, {nodes:,} nodes", nodes, 1e6 / nodes, slow, mixed=True, seed=seed))
        for nodes in (128, 512, 2048)
        for seed in (1, 2, 3)
    ]
    without = [
        simulate(Scenario(f"slow nodes leave, {nodes:,} nodes", nodes, 1e6 / nodes, slow, True, slow_leave=True))
        for nodes in (128, 512, 2048)
    ]
    measured = [simulate(Scenario("measured times", 2048, 500, MEASURED, seed=seed)) for seed in (1, 2, 3)]
    rows = [against_formula(found) for found in formula] + [against_best(measured)] + list(of_policy(mixed))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, [*formula, *mixed, *without, *measured])
    return int(any(found["ratio"] > found["target"] for found in rows))


def against_formula(found: Outcome) -> dict[str, Any]:
    """How far the simulated goodput is from the expected."""
    scenario = found.scenario
    should = expected(scenario.mean, scenario.interval, scenario.times).share
    is_ = found.useful / found.wall
    return row(f"{scenario.name}: simulated {is_:.4f}, expected {should:.4f}; apart", abs(is_ / should - 1), 0.01)


def against_best(outcomes: list[Outcome]) -> dict[str, Any]:
    """Time lost with the measured times, beside what nobody can avoid who saves at the best interval: Young and Daly's
    optimum with the same time of a save, restarts and detection included."""
    scenario = outcomes[0].scenario
    lost = statistics.mean(1 - found.useful / found.wall for found in outcomes)
    best = 1 - expected(scenario.mean, best_interval(scenario.mean, scenario.times.save), scenario.times).share
    return row(f"time lost with the measured times: {lost:.4f}, at the optimum {best:.4f}", lost / best, 1.2)


def of_policy(outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    """What the code that decides promises."""
    hours = sum(found.wall / HOUR * found.scenario.nodes for found in outcomes)
    yield row(f"runs lost, of {len(outcomes)} through {hours:,.0f} node-hours", sum(bool(f.lost) for f in outcomes), 0)
    longest = max(found.longest_avoided / found.scenario.mean for found in outcomes)
    yield row("longest that a node was left out after its time, in mean times between interruptions", longest, 10)
    yield row("most checkpoints on disk beside those to keep", max(f.most_kept - f.scenario.keep for f in outcomes), 0)


def show(rows: list[dict[str, Any]], outcomes: list[Outcome]) -> None:
    print("| | ratio | at most |\n|---|---|---|")
    for claim in rows:
        print(f"| {claim['name']} | {claim['ratio']:.4g} | {claim['target']:.4g} |")
    causes = sorted({cause for found in outcomes for cause in found.causes})
    print(f"\n| scenario, seed | goodput | {' | '.join(causes)} | interruptions |\n|---|---|{'---|' * len(causes)}---|")
    for found in outcomes:
        shares = " | ".join(f"{found.causes[cause] / found.wall:.3%}" for cause in causes)
        faults = ", ".join(f"{name} {count}" for name, count in sorted(found.faults.items()))
        name = f"{found.scenario.name}, {found.scenario.seed}"
        print(f"| {name} | {found.useful / found.wall:.3%} | {shares} | {faults} |")
        if found.lost:
            print(f"\nlost after {found.wall / HOUR:,.0f} h: {found.lost}\n")


if __name__ == "__main__":
    sys.exit(main())
