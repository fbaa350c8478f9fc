"""What grows with the number of ranks, at 64, 512 and 4,096 of them, without having them.

Everything that one process does for all ranks, or each for itself by the number of the others, is done by the real code
over files and messages of so many ranks, in memory. Each row's ratio is the cost at 4,096 ranks over that at 512; what
has to look at every rank may grow eightfold, all else not at all. Exits with 1 when a target is missed.
"""

import argparse
import gc
import json
import math
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from data_pipeline.files.atomic import write_atomic
from launch.slurm.policy import Outcome, diagnose
from launch.slurm.run_files import read_files
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.manifest import CheckpointManifest, CheckpointShard
from pretrain.checkpoint.retention import reasons
from pretrain.checkpoint.shard_file import write_tensors
from pretrain.engine.fragments import Fragment
from pretrain.preflight.group import Meeting
from pretrain.preflight.verdict import Link, Report, judge
from pretrain.run.checkpoint_folder import MANIFEST, step_path
from pretrain.run.job_records import Heartbeat, JobFolder, Pulse, RankFailure
from pretrain.run.journal import Journal
from pretrain.tracking.follower import assign
from pretrain.tracking.mlflow_state import JOURNAL
from pretrain.tracking.mlflow_sync import Mirror
from pretrain.tracking.system_metrics import EACH_NODE, AllNodes, journal_path

RANKS = (64, 512, 4096)
PER_NODE = 8
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
MATRICES, VECTORS, WIDTH = 96, 97, 64
"""A decoder of 24 layers, made thin: what costs here is the number of tensors, not their size."""
STATES = ("fp32", "exp_avg", "exp_avg_sq")
CACHES = torch.zeros(2**26, dtype=torch.uint8)
"""Larger than they are."""
KEPT = 3
"""Checkpoints on disk."""
EVERY_RANK = 1.3
"""Times as much for each rank at 4,096 as at 512."""
NO_RANK = 1.3
"""Times as much in all."""


class Row(NamedTuple):
    """Costs at each number of ranks."""

    name: str
    unit: str
    costs: tuple[float, ...]
    each: bool
    """It looks at every rank, so that it may grow with them."""

    @property
    def ratio(self) -> float:
        """At 4,096 over 512, for each rank where every rank is looked at."""
        return self.costs[-1] / self.costs[-2] / (RANKS[-1] / RANKS[-2] if self.each else 1)

    @property
    def target(self) -> float:
        """The most that it may be."""
        return EVERY_RANK if self.each else NO_RANK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, str, bool]]] = {}
    for ranks in RANKS:
        for part in (a_checkpoint, a_partitioned_checkpoint, a_heartbeat, failures, a_preflight, tracking):
            with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
                for name, told in part(Path(folder), ranks).items():
                    found.setdefault(name, []).append(told)
    rows = [Row(name, told[0][1], tuple(cost for cost, _, _ in told), told[0][2]) for name, told in found.items()]
    if as_json:
        print(json.dumps([row._asdict() | {"ratio": row.ratio, "target": row.target} for row in rows], indent=1))
    else:
        print(f"| | {' | '.join(f'{n:,} ranks' for n in RANKS)} | 4,096 over 512 | at most |")
        print(f"|{'---|' * (len(RANKS) + 3)}")
        for row in rows:
            costs = " | ".join(f"{cost:,.3g} {row.unit}" for cost in row.costs)
            grows = ", a rank" if row.each else ""
            print(f"| {row.name} | {costs} | {row.ratio:.2f}{grows} | {row.target} |")
    return int(any(row.ratio > row.target for row in rows))


def ms(work: Callable[[], object], times: int = 5, cold: bool = True) -> float:
    """The least of so many, in milliseconds of this process alone: other work on the machine adds little to it.

    `cold`: nothing is in the processor's caches, as in a run: what 512 ranks have told would stay there from one time
    to the next, and what 4,096 have would not.
    """
    taken = []
    gc.collect()
    gc.disable()  # what the benchmark holds for all ranks would be looked through
    for _ in range(times):
        if cold:
            CACHES.add_(1)
        since = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - since))
    gc.enable()
    return min(taken)


def shapes() -> dict[str, list[int]]:
    matrices = {f"backbone.layers.{n // 4}.matrix{n % 4}.weight": [WIDTH, WIDTH] for n in range(MATRICES)}
    return matrices | {f"backbone.layers.{n // 4}.norm{n % 4}.weight": [WIDTH] for n in range(VECTORS)}


def flat_fragments(ranks: int) -> list[list[tuple[str, int, int]]]:
    """Of ZeRO 1 and 2: all parameters in a row, cut into as many parts; each rank has a few of them."""
    sizes = {name: math.prod(shape) for name, shape in shapes().items()}
    share = math.ceil(sum(sizes.values()) / ranks)
    found: list[list[tuple[str, int, int]]] = [[] for _ in range(ranks)]
    at = 0
    for name, numel in sizes.items():
        start = 0
        while start < numel:
            piece = min(numel - start, share - at % share)
            found[at // share].append((name, start, piece))
            start, at = start + piece, at + piece
    return found


def partitioned_fragments(ranks: int) -> list[list[tuple[str, int, int]]]:
    """Of ZeRO 3: each parameter cut into as many parts; each rank has some of every one that is large enough."""
    found: list[list[tuple[str, int, int]]] = [[] for _ in range(ranks)]
    for name, shape in shapes().items():
        numel = math.prod(shape)
        share = math.ceil(numel / ranks)
        for rank in range(math.ceil(numel / share)):
            found[rank].append((name, rank * share, min(share, numel - rank * share)))
    return found


def write_checkpoint(
    root: Path, step: int, fragments: list[list[tuple[str, int, int]]], stage: int
) -> CheckpointManifest:
    """Real shards, of noughts, and the manifest, which is not written."""
    path = step_path(root, step)
    path.mkdir(parents=True)
    shards = []
    for rank, of_rank in enumerate(fragments):
        numel = sum(piece for _, _, piece in of_rank)
        file = path / f"shard-{rank:05d}.safetensors"
        size, digest = write_tensors(file, {state: torch.zeros(numel) for state in STATES}, threading.Event())
        shards.append(CheckpointShard(file=file.name, bytes=size, xxh3_128=digest, fragments=of_rank))
    return CheckpointManifest(
        step=step,
        optimizer_steps=step,
        world_size=len(fragments),
        zero_stage=stage,
        shapes=shapes(),
        states=dict.fromkeys(shapes(), STATES),
        shards=shards,
        state={"attempt": 1},
    )


def publish(root: Path, manifest: CheckpointManifest) -> None:
    write_atomic(step_path(root, manifest.step) / MANIFEST, manifest.sealed())


def a_checkpoint(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """Written by so many at ZeRO 1; read by a quarter less."""
    root = folder / "checkpoints"
    manifests = [write_checkpoint(root, step, flat_fragments(ranks), 1) for step in range(1, KEPT + 1)]
    for manifest in manifests:
        publish(root, manifest)
    written = ms(partial(publish, root, manifests[-1]))
    path = step_path(root, KEPT)
    checkpoint = Checkpoint(path)
    mine = flat_fragments(ranks * 3 // 4)[ranks // 2]

    def load() -> None:
        again = pickle.loads(pickle.dumps(checkpoint))
        for name, start, numel in mine:
            again.read(Fragment(name, start, numel, {state: torch.empty(numel) for state in STATES}))

    return {
        "manifest: seal and write": (written, "ms", True),
        "manifest: read and check, as rank 0 does for all": (ms(lambda: Checkpoint(path)), "ms", True),
        "manifest: what each rank is told": (len(pickle.dumps(checkpoint)) / 1e3, "kB", True),
        "load on three quarters of the ranks, a rank's share": (ms(load), "ms", True),
        "verify, a rank's share": (ms(lambda: checkpoint.verify(1, ranks)), "ms", True),
        f"retention, of {KEPT} checkpoints": (ms(lambda: reasons(root, 2, None)), "ms", True),
        "status of the run": (ms(lambda: read_files(folder)), "ms", True),
    }


def a_partitioned_checkpoint(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """The same at ZeRO 3."""
    manifest = write_checkpoint(folder, 1, partitioned_fragments(ranks), 3)
    written = ms(lambda: publish(folder, manifest))
    return {
        "manifest at ZeRO 3: seal and write": (written, "ms", True),
        "manifest at ZeRO 3: read and check": (ms(lambda: Checkpoint(step_path(folder, 1)), 3), "ms", True),
    }


def a_heartbeat(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """Rank 0's alone, whoever the others are."""
    pulse = Pulse(JobFolder(folder))

    def beat() -> None:
        pulse.rested()
        pulse.beat(Heartbeat(1, 1))

    return {"heartbeat": (ms(beat, 201, cold=False), "ms", False)}


def failures(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """Every rank has written why it ended, and srun has said so."""
    job = JobFolder(folder)
    words = "".join(f"srun: error: n{r // PER_NODE:04d}: task {r}: Exited with exit code 1\n" for r in range(ranks))
    for rank in range(ranks):
        what = "DistBackendError: NCCL error in: remote process exited or there was a network error"
        job.rank_failed(RankFailure("7", 0, rank, f"n{rank // PER_NODE:04d}", what, step=9, samples=[0, 1023]))

    def decide() -> None:
        assert diagnose(Outcome(rc=1), job.rank_failures("7", 0), words, 5, 9).step == 9

    return {"why a job ended, from a file of each rank": (ms(decide), "ms", True)}


def a_preflight(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """Rank 0 collects what all have posted to its store, and judges."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    for rank in range(ranks):
        report = Report(rank, f"n{rank // PER_NODE:04d}", matmul_gflops=1000.0 + rank % 7, clock=(-0.001, 0.001))
        report.links = [Link((rank - step) % ranks, rank, 20.0 + step) for step in (1, PER_NODE)]
        if rank % PER_NODE == 0:  # it has looked at the node
            names = ("Python", "torch", "deepspeed", "code hash", "driver", "GPU", "fingerprint of the data")
            report.same, report.write_mib_s = dict.fromkeys(names, "0" * 16), 900.0
        Meeting(store, rank, ranks).post("network", asdict(report))
    leader = Meeting(store, 0, ranks)
    came = leader.collect("network", 10.0)
    assert len(came) == ranks
    reports = [Report.of(content) for content in came.values()]
    return {
        "preflight: collect a report of each rank": (ms(lambda: leader.collect("network", 10.0)), "ms", True),
        "preflight: judge them": (ms(lambda: judge(reports, ranks)), "ms", True),
    }


def tracking(folder: Path, ranks: int) -> dict[str, tuple[float, str, bool]]:
    """A step of the journal, and a sample of 36 numbers from each node, to MLflow; of many nodes their sum."""
    nodes = ranks // PER_NODE
    journal, logs = Journal(folder / JOURNAL, 1), folder / "logs"
    journal.event("start", resumed_from=None, config={}, tags={})
    logs.mkdir()
    writers = [(f"n{node:04d}", Journal(journal_path(logs, f"n{node:04d}"), 1)) for node in range(nodes)]
    names = [f"{kind}_{n}" for n in range(4) for kind in ("cpu", *(f"gpu{gpu}" for gpu in range(PER_NODE)))]
    assign(folder, uri=None, experiment="ranks", run_name="run")
    mirror = Mirror(folder, print)
    all_nodes = AllNodes(logs, 1) if nodes > EACH_NODE else None

    def sample(step: int) -> float:
        journal.metrics(step, {"loss/total": 1.0})
        for node, writer in writers:
            writer.metrics(step, {f"system/{node}.{name}": float(n) for n, name in enumerate(names)})
        return ms(lambda: all_nodes.sum_up(step), 1) if all_nodes else 0.0

    sample(1)
    mirror.ship()
    run = mirror._open()
    with patch.object(mirror, "_open", lambda: run):  # else a new client each time
        summed, sent = zip(*((sample(step), ms(mirror.ship, 1)) for step in range(2, 7)), strict=True)
    return {
        "system metrics: sum up a sample of each node": (min(summed), "ms", True),
        "MLflow: a sample of all nodes, to an sqlite file": (min(sent), "ms", False),
    }


if __name__ == "__main__":
    sys.exit(main())
