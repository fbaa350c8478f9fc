"""What ranks do for `test_variants.py`."""

from dataclasses import replace

import torch

from model.architectures import registry
from model.architectures.registry import configure
from model.attention.routing import routings
from model.layers import chunked_loss
from pretrain.config.schema import load
from pretrain.engine.buffers import Centroids
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from tests.distributed.cases import train_steps
from tests.model.helpers import MIXED, MIXED_BOTH_WAYS, NAMED, batch_of, build, small


def losses_of(ranks: Ranks, stage: int, names: list[str]) -> dict[str, list[float]]:
    """Losses of three steps of each variant at a ZeRO stage, the logits in chunks of 7 tokens."""
    chunked_loss.chunk_tokens = lambda *_: 7
    found = {}
    for name in names:
        config = load(["batch.tokens=64", "model.context=8", f"engine.zero_stage={stage}", "engine.precision=fp32"])
        shape = {"layers": 2, "width": 16, "heads": 2, "context": 8, "vocab_size": 41}
        model = configure(shape | (NAMED | MIXED | MIXED_BOTH_WAYS)[name])
        config = config.model_copy(update={"model": model})
        torch.manual_seed(0)
        engine = Engine(registry.build(config.model), config, ranks)
        found[name] = train_steps(engine, ranks, config, 1, 3)
    return found


def centroids_of(ranks: Ranks, passes: list[list[list[int]]], skipped: bool = False) -> list[str]:
    """Centroids after a step over such texts, by the rank that reads them and by its passes.

    `skipped`: after one that was not applied.
    """
    scores = {"kind": "routing", "clusters": 3, "decay": 0.5}
    model = build(small("decoder_only", scores=scores, learned_dropout={"enabled": False})).double().train()
    batch = batch_of(model.config, sequences=6)
    centroids = Centroids(model, ranks)
    if skipped:
        model(batch).loss.backward()
        centroids.after_step(applied=False)
    for rows in passes[ranks.rank]:
        given = replace(batch, input_ids=batch.input_ids[rows], labels=batch.labels[rows], samples=batch.samples[rows])
        model(given).loss.backward()
    centroids.after_step(applied=True)
    return [routing.centroids.numpy().tobytes().hex() for routing in routings(model)]
