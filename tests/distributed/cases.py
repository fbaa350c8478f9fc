"""What ranks do in the tests of engine and checkpoint; started through the fixture `ranks`."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from model import registry
from model.interface import Batch
from pretrain import checkpoint
from pretrain.config import Config, load
from pretrain.distributed import Ranks
from pretrain.engine import STATES, Engine

VOCABULARY = 41


def small_config(stage: int, precision: str, micro_batch: int | None = None) -> Config:
    """A model with every kind of parameter: tied table, matrices, vectors; noise on."""
    return load(
        [
            "model.layers=1",
            "model.width=16",
            "model.heads=2",
            "model.context=8",
            f"model.vocab_size={VOCABULARY}",
            "model.bias=true",
            "batch.tokens=64",
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
        ]
        + ([f"batch.micro_batch={micro_batch}"] if micro_batch else [])
    )


def make_engine(ranks: Ranks, config: Config, seed: int = 0) -> Engine:
    """A fresh engine; `seed` chooses its first weights."""
    torch.manual_seed(seed)
    return Engine(registry.build(config.model), config, ranks)


def train_steps(engine: Engine, ranks: Ranks, config: Config, first: int, last: int) -> list[float]:
    """Steps first..last on tokens that are a function of the global sample only; mean loss of each."""
    losses = []
    micro_batch, _ = config.micro_batches(ranks.world_size)
    for step in range(first, last + 1):
        positions = torch.arange((step - 1) * config.global_batch, step * config.global_batch)
        mine = positions[ranks.rank :: ranks.world_size]
        batches = [
            Batch(tokens[:, :-1], tokens[:, 1:], samples, torch.tensor(step), seed=5)
            for samples in mine.split(micro_batch)
            for tokens in [torch.stack([_tokens(int(s), config.model.context) for s in samples])]
        ]
        metrics, _, _ = engine.train_step(batches, lr=1e-2)
        mean = torch.stack([m["loss"].float() for m in metrics]).mean()
        losses.append(float(ranks.sum(mean)) / ranks.world_size)
    return losses


def digest(engine: Engine, ranks: Ranks) -> dict[str, str]:
    """A hash of all parameters and moments, independent of how they are spread."""
    whole = {}
    for rank_pieces in ranks.gather(
        [(f.name, f.start, {k: v.clone() for k, v in f.states.items()}) for f in engine.owned_fragments()]
    ):
        for name, start, states in rank_pieces:
            whole[name, start] = states
    result = {}
    for state in STATES:
        sha = hashlib.sha256()
        by_name: dict[str, list[torch.Tensor]] = {}
        for name, start in sorted(whole):
            by_name.setdefault(name, []).append(whole[name, start][state])
        for name in sorted(by_name):
            sha.update(name.encode() + torch.cat(by_name[name]).numpy().tobytes())
        result[state] = sha.hexdigest()
    return result


def train_and_save(
    ranks: Ranks, root: str, stage: int, precision: str, save_at: int, until: int, micro_batch: int | None = None
) -> dict[str, Any]:
    """Train, save on the way, and go on."""
    config = small_config(stage, precision, micro_batch)
    engine = make_engine(ranks, config)
    before = train_steps(engine, ranks, config, 1, save_at)
    checkpoint.save(engine, Path(root), save_at, {"who": "test"}, ranks, lambda: None)
    saved = digest(engine, ranks)
    after = train_steps(engine, ranks, config, save_at + 1, until)
    return {"losses": before + after, "saved": saved, "final": digest(engine, ranks)}


def resume(ranks: Ranks, root: str, stage: int, precision: str, until: int, micro_batch: int | None = None) -> dict[str, Any]:
    """Load the newest checkpoint into an engine with other first weights, and train on."""
    config = small_config(stage, precision, micro_batch)
    engine = make_engine(ranks, config, seed=99)
    warnings: list[str] = []
    found = checkpoint.newest(Path(root), ranks, warnings.append)
    assert found is not None
    found.load(engine)
    loaded = digest(engine, ranks)
    losses = train_steps(engine, ranks, config, found.manifest.step + 1, until)
    return {
        "step": found.manifest.step,
        "loaded": loaded,
        "losses": losses,
        "final": digest(engine, ranks),
        "warnings": warnings,
    }


def _tokens(sample: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample)
    return torch.randint(VOCABULARY, (context + 1,), generator=generator)
