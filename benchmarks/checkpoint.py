"""What a checkpoint costs: how long training waits for it and what else it loses, how fast it is written and read.

The sizes are those of a model's parameters; AdamW makes 12 bytes of each. Training goes on during a save, with few
tokens a step. Everything is on one rank, in a folder of its own in --dir. Exits with 1 when a target is missed.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files.atomic import sync_folder
from model.architectures import registry
from model.batch import Batch
from pretrain.checkpoint.checkpoint import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.shard_file import BLOCK
from pretrain.config.schema import load
from pretrain.engine.distributed import Ranks, join
from pretrain.engine.engine import Engine
from pretrain.run.checkpoint_folder import complete, step_path

MODELS = {  # parameters in millions: layers, width, vocabulary
    10: (4, 256, 4096),
    30: (6, 384, 4096),
    100: (7, 640, 4096),
    300: (8, 1024, 16384),
}
TOKENS = 128
"""Of a step. The fewer there are, the less time a save has for its copy before the update."""
ROUNDS, STEPS = 5, 2
"""So many steps before each save in training and after it are those it is compared with."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    sizes = "millions of parameters; 100 take 5 GB of memory and 6 GB of disk, 300 three times that"
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(MODELS), default=[10, 30, 100], help=sizes)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; the system's temporary one")
    arguments = parser.parse_args()
    rows = []
    with join(timeout_minutes=10) as ranks:
        for millions in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
                rows += measure(Path(folder), ranks, MODELS[millions])
            gc.collect()  # DeepSpeed's engines hold on to themselves
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| medians | ratio | at most |\n|---|---|---|")
        for row in rows:
            print(f"| {row['name']} | {row['ratio']:.3f} | {row['target'] or '–'} |")
    return int(any(row["target"] and row["ratio"] > row["target"] for row in rows))


def measure(folder: Path, ranks: Ranks, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The ways in turn, ROUNDS times, after one of each that is not counted; the rows of one size."""
    layers, width, vocabulary = shape
    sizes = [f"model.layers={layers}", f"model.width={width}", f"model.heads={width // 64}", "model.context=64"]
    config = load([*sizes, f"model.vocab_size={vocabulary}", f"batch.tokens={TOKENS}", "engine.precision=fp32"])
    engine = Engine(registry.build(config.model), config, ranks)
    fragments = engine.owned_fragments()
    total = sum(values.numel() * values.element_size() for f in fragments for values in f.states.values())
    tokens = torch.randint(vocabulary, (TOKENS // 64, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(len(tokens)), torch.tensor(1), seed=0)
    told: list[float] = []
    taken: dict[str, list[float]] = defaultdict(list)
    saver = Saver(
        engine,
        folder / "duet",
        ranks,
        still_ours=lambda: None,
        sync_journal=lambda: None,
        prune=lambda step: None,
        warn=print,
        published=lambda checkpoint: told.append(checkpoint.blocked),
    )
    step = 0

    def save() -> None:
        nonlocal step
        step += 1
        saver.start(step, {})
        while saver.writing:
            time.sleep(0.001)
        saver.poll(False)
        while saver.writing:
            time.sleep(0.001)
        saver.poll(False)

    def save_in_training() -> None:
        """As the trainer does: steps go on, and at the edge of each the save does."""
        nonlocal step
        step += 1
        train_step()  # what the other ways left in the caches is gone
        alone = [train_step() for _ in range(STEPS)]
        told.clear()
        since = time.perf_counter()
        saver.start(step, {})
        beside = []
        while not told:
            beside.append(train_step())
            saver.poll(bool(ranks.largest(saver.writing)[0]))
        whole = time.perf_counter() - since
        alone += [train_step() for _ in range(STEPS)]
        taken["blocked"] += told
        taken["a step"].append(statistics.median(alone))
        taken["the step after a save's start"].append(beside[0])
        taken["lost to a save in all"].append(whole - len(beside) * taken["a step"][-1])

    def train_step() -> float:
        since = time.perf_counter()
        engine.train_step([batch], lr=1e-4)
        return time.perf_counter() - since

    def torch_save(durable: bool) -> None:
        tensors = {f"{f.name}/{state}": values for f in fragments for state, values in f.states.items()}
        with open(folder / "torch.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())

    def plain_write() -> None:
        with open(folder / "plain", "wb") as file:
            for start in range(0, len(content), BLOCK):
                file.write(memoryview(content)[start : start + BLOCK])
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)

    def plain_read() -> None:
        with open(shard(), "rb", buffering=0) as file:
            for start in range(0, len(content), BLOCK):
                file.readinto(memoryview(content)[start : start + BLOCK])

    def shard() -> Path:
        return step_path(folder / "duet", step) / "shard-00000.safetensors"

    save()  # allocates the buffers
    content = bytearray(shard().stat().st_size)
    plain_read()
    ways: dict[str, Callable[[], object]] = {
        "save": save,
        "save in training": save_in_training,
        "torch.save, flush, fsync": lambda: torch_save(durable=True),
        "torch.save": lambda: torch_save(durable=False),
        "DeepSpeed's save": lambda: engine.export_deepspeed(folder / "deepspeed"),
        "write and fsync of the same bytes": plain_write,
        "load": lambda: Checkpoint(step_path(folder / "duet", step)).load(engine),
        "read of the same file": plain_read,
        "load and verify": lambda: verified_load(Checkpoint(step_path(folder / "duet", step)), engine),
    }
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            since = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - since)
            for file in folder.rglob("*"):  # nobody pays for what another left in the page cache
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
        for older in complete(folder / "duet")[1:]:
            shutil.rmtree(older)
    saver.__exit__(None, None, None)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    parameters = sum(f.numel for f in fragments) / 1e6
    compared = [
        ("blocked", "torch.save, flush, fsync", 0.1),
        ("blocked", "torch.save", None),
        ("blocked", "DeepSpeed's save", 0.5),
        ("lost to a save in all", "torch.save, flush, fsync", None),
        ("the step after a save's start", "a step", None),
        ("save", "write and fsync of the same bytes", None),
        ("load", "read of the same file", None),
        ("load and verify", "read of the same file", None),
    ]
    return [
        {
            "name": f"{parameters:.0f} M ({total / 1e6:.0f} MB): {ours} ({medians[ours]:.3f} s) / "
            f"{other} ({medians[other]:.3f} s)",
            "ratio": medians[ours] / medians[other],
            "target": target_ratio,
        }
        for ours, other, target_ratio in compared
    ]


def verified_load(checkpoint: Checkpoint, engine: Engine) -> None:
    checkpoint.verify()
    checkpoint.load(engine)


if __name__ == "__main__":
    sys.exit(main())
