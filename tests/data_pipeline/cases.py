"""What ranks do in the tests of the data pipeline; started through the fixture `ranks`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.config import DataConfig
from data_pipeline.files.atomic import write_atomic
from data_pipeline.loading.loader import Loader, Reader
from data_pipeline.sampling.data_state import DataState
from data_pipeline.sampling.packing_plan import prepare
from data_pipeline.sampling.sample_plan import Plan, go_on, wanted_phase
from data_pipeline.storage.dataset import Dataset
from data_pipeline.storage.manifest import ShardFacts
from data_pipeline.storage.remote_shards import RemoteShards
from pretrain.engine.distributed import Ranks

SAVE_EVERY = 3


def read_steps(
    ranks: Ranks,
    path: str,
    folder: str,
    data: dict[str, Any],
    context: int,
    global_batch: int,
    steps: int,
    kill_at: int | None = None,
) -> int:
    """Go on from the state saved in `folder` and write down what each step read; the last rank may be killed.

    Returns the position from which it went on.
    """
    dataset = Dataset.open(path, check=ranks.is_first)
    saved = Path(folder) / "state.json"
    state = DataState(fingerprint=dataset.manifest.fingerprint, seed=3)
    if saved.exists():
        state = DataState.model_validate_json(saved.read_text())
    config = DataConfig.model_validate({"path": path, **data})
    if config.packing == "best_fit":
        ranks.together(lambda: prepare(dataset, context), only_first=True)
    state = go_on(state, dataset, config, context)
    began = state.samples_seen
    reader = Reader(
        Plan(dataset, state.phases[-1], state.seed),
        global_batch=global_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=began,
    )
    with Loader(reader) as loader, open(Path(folder) / "read.jsonl", "a") as log:
        for step in range(1, steps + 1):
            samples = next(loader)
            if step == kill_at and ranks.rank == ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            mine = [
                (position, xxhash.xxh3_64_hexdigest(row.tobytes()))
                for position, row in zip(samples.positions.tolist(), samples.tokens.numpy(), strict=True)
            ]
            together = [pair for rank in ranks.gather(mine) for pair in rank]
            state = state.after(global_batch, global_batch * context)
            if ranks.is_first:
                log.write(json.dumps(sorted(together)) + "\n")
                log.flush()
                if step % SAVE_EVERY == 0:
                    write_atomic(saved, state.model_dump_json())
    return began


def read_remote(ranks: Ranks, uri: str, cache: str, limit: int, steps: int, start: int) -> dict[str, Any]:
    """A digest of what this rank reads, and which shards it fetched into the cache that all share."""
    fetched = []
    copy = RemoteShards._copy

    def noted(self: RemoteShards, shard: ShardFacts, out: Any) -> None:
        fetched.append(shard.path)
        copy(self, shard, out)

    RemoteShards._copy = noted  # type: ignore[method-assign]
    data = DataConfig(path=uri, cache=cache, cache_bytes=limit, order="block")
    dataset = Dataset.of(data, check=ranks.is_first)
    plan = Plan(dataset, wanted_phase(dataset, data, 32), 0)
    reader = Reader(plan, global_batch=64, rank=ranks.rank, world_size=ranks.world_size, start=start)
    read = []
    with Loader(reader) as loader:
        for _ in range(steps):
            step = next(loader)
            read.append([step.positions.tolist(), xxhash.xxh3_64_hexdigest(step.tokens.numpy().tobytes())])
    return {"read": read, "fetched": fetched}
