"""Reading batches beside a numpy memmap and beside other libraries; a rank's start at 10^12 tokens.

Data are hot in cache, but in the row that says cold. CPU time is compared, since the machine may be shared; batches of
8 x 2,049 tokens, uint16 on disk, int64 in the batch, random windows. Exits with 1 when a target is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reading import peers, start
from reading.peers import BATCH, CONTEXT
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.config import DataConfig
from data_pipeline.loading.loader import Loader, Reader
from data_pipeline.sampling.packed_windows import PackedWindows
from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.sampling.sample_plan import Plan, wanted_phase
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest, ShardFacts, SourceFacts, SplitFacts, TokenizerFacts
from data_pipeline.storage.shards import BATCH_TOKENS, ShardWriter

TOKENS = 64 * 2**20
ROUNDS = 27
BLOCK_SECONDS = 0.1
SETTLING_BATCHES = 100  # A thread goes on reading for a while when it is another way's turn.
STARTS = 9
COLD_ROUNDS, COLD_BATCHES = 7, 200
PEER_TARGETS = {"megatron-core": 3.0, "mosaicml-streaming": 8.0, "datasets": 5.0, "datatrove": 1.0, "grain": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--peers", type=Path, help="folder of benchmarks/reading/requirements.txt, to compare with")
    parser.add_argument("--folder", type=Path, help="where to write 1 GB for a while")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = batches(Path(folder), args.peers) + starting(Path(folder) / "start")
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | value | target |\n|---|---|---|")
        for row in rows:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.3g}"
            print(f"| {row['name']} | {value} | {row['target']} |")
    return int(any(row["missed"] for row in rows))


def at_least(name: str, value: float, target: float) -> dict[str, Any]:
    return {"name": name, "value": value, "target": f"at least {target:g}", "missed": value < target}


def at_most(name: str, value: float, target: float) -> dict[str, Any]:
    return {"name": name, "value": value, "target": f"at most {target:g}", "missed": value > target}


def batches(folder: Path, packages: Path | None) -> list[dict[str, Any]]:
    tokens, ends = corpus()
    flat = folder / "flat.bin"
    tokens.tofile(flat)
    dataset = write(folder / "ours", tokens, ends)
    plan = Plan(dataset, wanted_phase(dataset, DataConfig(path="ours"), CONTEXT), 0)

    def reader(**options: bool) -> Reader:
        return Reader(plan, global_batch=BATCH, rank=0, world_size=1, **options)

    ways: dict[str, Iterator[Any]] = {
        "floor": memmap(flat),
        "plain": iter(reader()),
        "documents": iter(reader(documents=True)),
        "packed": iter(packed(dataset)),
    }
    with Loader(reader()) as loader:
        speed, _ = measure(ways | {"thread": loader})
        # The workers' own CPU time is not seen from here, so the clock decides.
        workers = iter(DataLoader(_InWorkers(reader()), batch_size=None, num_workers=2))
        _, wall = measure({"thread": loader, "workers": workers})
        del workers
    megatokens = speed["plain"] / 1e6
    rows = [
        at_least(f"plain windows ({megatokens:.0f} Mtok/s) / numpy memmap", speed["plain"] / speed["floor"], 1.0),
        at_least("with document bounds / numpy memmap", speed["documents"] / speed["floor"], 0.45),
        at_least("one prefetch thread / in-process", speed["thread"] / speed["plain"], 0.75),
        at_least(
            "one prefetch thread / DataLoader with 2 workers, by the clock", wall["thread"] / wall["workers"], 1.0
        ),
    ]
    padding = PackedWindows.of(dataset, "train", CONTEXT, "text").padding
    rows.append(
        at_least(f"packed windows ({padding:.2%} padding) / plain windows", speed["packed"] / speed["plain"], 0.2)
    )
    rows += cold(folder)
    return rows + beside(packages, iter(reader()), tokens, ends, folder) if packages else rows


def beside(
    packages: Path, ours: Iterator[Any], tokens: np.ndarray, ends: np.ndarray, folder: Path
) -> list[dict[str, Any]]:
    sys.path.append(str(packages.resolve()))
    ways, failed = {"plain": ours}, {}
    for name, make in peers.PEERS.items():
        try:
            ways[name] = make(tokens, ends, folder)
            next(ways[name])
        except Exception as error:  # A peer that does not install or run is listed with its error.
            del ways[name]
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    speed, _ = measure(ways)
    rows = []
    for name, target in PEER_TARGETS.items():
        if name in speed:
            rows.append(at_least(f"plain windows / {name}", speed["plain"] / speed[name], target))
        else:
            rows.append({"name": name, "value": failed[name], "target": "", "missed": False})
    return rows


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Zipf ids, and where documents of lognormal length end."""
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.2, TOKENS) % 32_000).astype(np.uint16)
    lengths = np.maximum(2, rng.lognormal(np.log(542), 1.0, TOKENS // 400)).astype(np.int64)
    ends = np.cumsum(lengths)
    return tokens, np.append(ends[ends < TOKENS], TOKENS)


def write(root: Path, tokens: np.ndarray, ends: np.ndarray) -> Dataset:
    (root / "train").mkdir(parents=True)
    writer = ShardWriter(root / "train", "t", TOKENS // 2, tokens.dtype, {})
    begin = 0
    for end in ends.tolist():
        writer.append(tokens[begin:end], True)
        begin = end
    shards = [
        ShardFacts(f"train/{s.path.name}", "train", "text", s.tokens, s.documents, s.batches, s.bytes, s.xxh3_128)
        for s in writer.finish()
    ]
    source = SourceFacts(
        name="text", inputs=[], documents=len(ends), bytes=0, tokens={"train": TOKENS},
        split_documents={"train": len(ends)}, split_bytes={"train": 0}, dropped={}, replaced=0,
    )  # fmt: skip
    Manifest(
        fingerprint="f" * 64, identity={}, dtype="uint16", batch_tokens=BATCH_TOKENS, shard_tokens=TOKENS // 2,
        tokenizer=TokenizerFacts(sha256="0" * 64, vocab_size=32_000, type="bpe", eos_id=1, unk_id=0),
        sources=[source], shards=shards,
        splits={"train": SplitFacts(tokens=TOKENS, documents=len(ends), bytes=0, unknown=0)},
    ).save(root)  # fmt: skip
    return Dataset.open(root)


def packed(dataset: Dataset) -> Reader:
    prepare(dataset, CONTEXT)
    wanted = wanted_phase(dataset, DataConfig(path="ours", packing="best_fit"), CONTEXT)
    return Reader(Plan(dataset, wanted, 0), global_batch=BATCH, rank=0, world_size=1)


def memmap(flat: Path) -> Iterator[torch.Tensor]:
    """What one would write by hand: slices of a memmap into an int64 batch, in a random order that is free."""
    tokens = np.memmap(flat, np.uint16, "r")
    for numbers in peers.order((len(tokens) - 1) // CONTEXT):
        out = np.empty((BATCH, CONTEXT + 1), np.int64)
        for row, number in enumerate(numbers):
            out[row] = tokens[number * CONTEXT : number * CONTEXT + CONTEXT + 1]
        yield torch.from_numpy(out)


def cold(folder: Path) -> list[dict[str, Any]]:
    """Windows whose pages were dropped from the page cache before, by the clock: the disk decides."""
    flat, ours = folder / "cold.bin", folder / "cold"  # Copies: pages that are mapped elsewhere would stay.
    shutil.copy(folder / "flat.bin", flat)
    shutil.copytree(folder / "ours", ours)
    seconds: dict[str, list[float]] = {"hot": [], "floor": [], "plain": []}
    for _ in range(COLD_ROUNDS):
        for name, times in seconds.items():
            if name == "hot":
                flat.read_bytes()
            for file in [flat, *(ours / "train").iterdir()] if name != "hot" else []:
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            since = time.perf_counter()
            way = memmap(flat) if name != "plain" else iter(fresh(ours))
            for _ in range(COLD_BATCHES):
                next(way)
            times.append(time.perf_counter() - since)
            del way  # and its maps
    hot, floor, plain = (statistics.median(times) for times in seconds.values())
    name = f"cold, {COLD_BATCHES} batches from opening on: numpy memmap ({floor:.3f} s) / plain windows ({plain:.3f} s)"
    value = floor / plain if floor > 2 * hot else "not measured: the pages stayed in the cache"
    return [{"name": name, "value": value, "target": "none", "missed": False}]


def fresh(root: Path) -> Reader:
    dataset = Dataset.open(root)
    plan = Plan(dataset, wanted_phase(dataset, DataConfig(path="ours"), CONTEXT), 0)
    return Reader(plan, global_batch=BATCH, rank=0, world_size=1)


class _InWorkers(IterableDataset[torch.Tensor]):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (step.tokens for step in self.reader)


def measure(ways: dict[str, Iterator[Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second of CPU time, and of the clock: blocks of all ways in turn, medians."""
    for name in set(ways) & {"floor", "plain", "documents", "packed", "thread"}:
        for _ in range(TOKENS // CONTEXT // BATCH):  # every page and every view once
            next(ways[name])
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            for _ in range(SETTLING_BATCHES):
                next(way)
            since, used, read = time.perf_counter(), time.process_time(), 0
            while time.process_time() - used < BLOCK_SECONDS and time.perf_counter() - since < 8 * BLOCK_SECONDS:
                for _ in range(20):
                    next(way)
                read += 20
            tokens = read * BATCH * (CONTEXT + 1)
            cpu[name].append(tokens / (time.process_time() - used))
            wall[name].append(tokens / (time.perf_counter() - since))
    return (
        {name: statistics.median(values) for name, values in cpu.items()},
        {name: statistics.median(values) for name, values in wall.items()},
    )


def starting(root: Path) -> list[dict[str, Any]]:
    """Starts of two ranks of 4,096: the first of its node, which looks at the shards, and another one."""
    start.write(root)
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    for _ in range(STARTS):
        for rank in (0, 5):
            for position in (0, 10**11):
                command = [sys.executable, start.__file__, str(root), str(rank), str(position)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found.setdefault((rank, position), []).append(json.loads(done.stdout))

    def median(rank: int, position: int, what: str) -> float:
        return statistics.median(one[what] for one in found[rank, position])

    def beside(rank: int) -> float:
        return statistics.median(one["cpu"] / one["floor"] for one in found[rank, 0])

    def told(rank: int) -> str:
        return f"({median(rank, 0, 'cpu'):.2f} CPU-s) / "

    shown = f"start to the first batch, {start.SHARDS} shards, {start.SHARDS * start.SHARD_TOKENS:.3g} tokens"
    parsing = f"parsing the manifest ({median(5, 0, 'floor'):.2f})"
    looking = f"that and the size of each shard ({median(0, 0, 'floor'):.2f})"
    return [
        at_most(f"{shown}, any rank {told(5)}{parsing}", beside(5), 6.0),
        at_most(f"{shown}, first rank of a node {told(0)}{looking}", beside(0), 4.0),
        at_most("MB that a start takes", median(0, 0, "memory") / 1e6, 100),
        at_most("start at sample 1e11 / start at 0", median(5, 10**11, "cpu") / median(5, 0, "cpu"), 1.1),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
