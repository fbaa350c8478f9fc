"""One rank's start at a dataset of 10^12 tokens in 64,000 shards: CPU seconds to the first batch, beside those of what
cannot be avoided, and memory it takes.

Run by benchmarks/data.py, each time in a process of its own. The shards are real files, hard links to a few.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch  # noqa: F401 - imported before the clock starts, as a run has it

from data_pipeline.config import DataConfig
from data_pipeline.ingest.splits import Split
from data_pipeline.loading.loader import Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.sample_plan import Plan, go_on
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import Manifest, ShardFacts, SourceFacts, SplitFacts, TokenizerFacts
from data_pipeline.storage.shards import BATCH_TOKENS, ShardWriter

SHARDS = 64_000
SOURCES = 8
SHARD_TOKENS = 15 * BATCH_TOKENS
CONTEXT = 2048
GLOBAL_BATCH = 4096


def write(root: Path) -> None:
    """The dataset: 64,000 names for eight files, 1.007e12 tokens."""
    (root / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards, sources = [], []
    for source in range(SOURCES):
        writer = ShardWriter(root / "train", f"s{source}", SHARD_TOKENS, np.dtype(np.uint16), {})
        tokens = rng.integers(0, 32_000, SHARD_TOKENS, np.uint16)
        for begin in range(0, SHARD_TOKENS, 1000):
            writer.append(tokens[begin : begin + 1000], True)
        [written] = writer.finish()
        count = SHARDS // SOURCES
        for number in range(count):
            name = f"train/s{source}-{number:06d}-{written.xxh3_128[:8]}.arrow"
            os.link(written.path, root / name)
            shards.append(
                ShardFacts(
                    path=name,
                    split="train",
                    source=f"s{source}",
                    tokens=written.tokens,
                    documents=written.documents,
                    batches=written.batches,
                    bytes=written.bytes,
                    xxh3_128=written.xxh3_128,
                )
            )
        each: dict[Split, int] = {"train": written.tokens * count}
        sources.append(
            SourceFacts(
                name=f"s{source}",
                inputs=[],
                documents=written.documents * count,
                bytes=0,
                tokens=each,
                split_documents={"train": written.documents * count},
                split_bytes={"train": 0},
                dropped={},
                replaced=0,
            )
        )
    total = sum(shard.tokens for shard in shards)
    Manifest(
        fingerprint="f" * 64,
        identity={},
        tokenizer=TokenizerFacts(sha256="0" * 64, vocab_size=32_000, type="bpe", eos_id=1, unk_id=0),
        dtype="uint16",
        batch_tokens=BATCH_TOKENS,
        shard_tokens=SHARD_TOKENS,
        sources=sources,
        shards=shards,
        splits={
            "train": SplitFacts(tokens=total, documents=sum(source.documents for source in sources), bytes=0, unknown=0)
        },
    ).save(root)


def memory() -> int:
    """Bytes of this process that no file backs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def start(root: str, rank: int, position: int) -> dict[str, float]:
    before, since, cpu = memory(), time.perf_counter(), time.process_time()
    dataset = Dataset.open(root, check=rank == 0)
    state = DataState(fingerprint=dataset.manifest.fingerprint, seed=0)
    state = go_on(state, dataset, DataConfig(path=root), CONTEXT).after(position, 0)
    plan = Plan(dataset, state.phases[-1], state.seed)
    opened = time.process_time() - cpu
    reader = Reader(plan, global_batch=GLOBAL_BATCH, rank=rank, world_size=4096, start=state.samples_seen)
    next(iter(reader))
    used, taken = time.process_time() - cpu, memory() - before
    return {
        "open": opened,
        "seconds": time.perf_counter() - since,
        "cpu": used,
        "floor": floor(Path(root), check=rank == 0),
        "memory": taken,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def floor(root: Path, *, check: bool) -> float:
    """CPU seconds of parsing the manifest as JSON and, with `check`, of asking for the size of each shard."""
    cpu = time.process_time()
    facts = json.loads((root / "manifest.json").read_bytes())
    for shard in facts["shards"] if check else []:
        Path(f"{root}/{shard['path']}").stat()
    return time.process_time() - cpu


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
