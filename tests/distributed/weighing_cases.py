"""A few steps of small runs, to be compared over micro-batches, ranks and stages; started through `ranks`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from data_pipeline.loading.loader import Reader
from data_pipeline.sampling.sample_plan import Plan, wanted_phase
from model.attention.visibility import Visible
from model.batch import IGNORE, Batch
from model.masks.telemetry import told
from pretrain.engine.distributed import Ranks
from pretrain.engine.engine import Engine
from pretrain.engine.sequence import Ulysses
from pretrain.evaluation.batches import Batches
from pretrain.evaluation.evaluate import evaluate, held_out_bytes
from pretrain.run.goodput import Goodput
from pretrain.tracking.metrics import Meter
from tests.distributed.cases import make_engine
from tests.distributed.engine_cases import small
from tests.distributed.evaluation_cases import opened

STEPS = 2
NO_PENALTIES = ["model.learned_dropout.enabled=false"]
OF_THE_MACHINE = ("time/", "system/")
"""What else a journal tells."""


def learn(ranks: Ranks, runs: list[list[str]], sabotage: str | None = None) -> list[dict[str, float]]:
    """Of each run's arguments, what the journal tells of its steps and of a validation, by `STEP NAME`.

    `sabotage`: "weights": labels weigh alike within a micro-batch only; "tokens": what is told of positions does;
    "moments": a deviation is the mean of those of the micro-batches; "columns": ranks that share rows draw noise as if
    each held their start.
    """
    weighed, add = Engine._weighed, Meter.add
    if sabotage == "weights":
        Engine._weighed = lambda self, batches: list(batches)  # type: ignore[method-assign,assignment]
    elif sabotage == "tokens":

        def own_tokens(engine: Engine, batches: Sequence[Batch]) -> list[Batch]:
            made = [(batch, batch.counts) for batch in weighed(engine, batches)]
            return [replace(b, counts=c._replace(tokens=b.num_tokens())) for b, c in made if c is not None]

        Engine._weighed = own_tokens  # type: ignore[method-assign,assignment]
    elif sabotage == "moments":

        def told_of_each(meter: Meter, step: int, metrics: Any, known: Any) -> None:
            add(meter, step, [told(one) for one in metrics], known)

        Meter.add = told_of_each  # type: ignore[method-assign,assignment]
    elif sabotage == "columns":
        Visible.first = 0  # type: ignore[method-assign,assignment]
    return [learned(ranks, args) for args in runs]


def learned(ranks: Ranks, args: list[str]) -> dict[str, float]:
    """Of one run."""
    config, dataset, windows, model = opened(args)
    ranks = replace(ranks, sequence_parallel=config.engine.sequence_parallel)
    exchange = Ulysses(ranks) if ranks.sequence_parallel > 1 else None
    batches, engine = Batches.of(config, dataset, ranks.device, exchange), Engine(model, config, ranks)
    phase, seed = wanted_phase(dataset, config.data, config.model.context), config.run.seed
    reader = Reader(
        Plan(dataset, phase, seed),
        global_batch=config.global_batch,
        rank=ranks.reader,
        world_size=ranks.readers,
        documents=batches.objective.needs_documents,
    )
    meter = Meter(config, engine, ranks, Goodput(time.time()), restarts=0)
    micro_batch, _ = config.micro_batches(ranks.world_size)
    for step, samples in enumerate(islice(reader, STEPS), start=1):
        engine.stopwatch.start()
        made = batches.of_step(samples, micro_batch, step, seed)
        engine.stopwatch.lap("data")
        metrics, norm, applied = engine.train_step(made, lr=1e-3)
        assert applied
        meter.add(step, metrics, partial(dict, {"optim/grad_norm": norm}))
    found = {f"{line.step} {name}": value for line in meter.flush() for name, value in line.values.items()}
    of_text = evaluate(engine.module, windows, held_out_bytes(dataset), micro_batch, ranks, batches)
    found |= {f"validation {name}": value for name, value in of_text.items()}
    return {name: value for name, value in found.items() if not name.split()[1].startswith(OF_THE_MACHINE)}


def without_labels(ranks: Ranks, stage: int) -> dict[str, list[float]]:
    """Loss, share of the cross entropy and gradient norm of three steps on two ranks.

    `half`: the second rank has no label; `alone`: both ranks have what the first one had; `none`: nobody has any.
    """
    config = small(f"engine.zero_stage={stage}", "engine.precision=fp32", "data.mask_boundaries=true", *NO_PENALTIES)
    generator, found = torch.Generator().manual_seed(0), {}
    tokens = torch.randint(config.model.vocab_size or 0, (4, config.model.context + 1), generator=generator)
    for kind, keeps in (("half", ranks.is_first), ("alone", True), ("none", False)):
        engine = make_engine(ranks, config)
        labels = tokens[:, 1:] if keeps else torch.full_like(tokens[:, 1:], IGNORE)
        batch = Batch(tokens[:, :-1], labels, torch.arange(4), torch.tensor(1), seed=0)
        [metrics], norm, _ = engine.train_step([batch], lr=0.0)
        numbers = torch.stack([metrics["loss"].double(), metrics["cross_entropy"].double(), norm.double()])
        found[kind] = (ranks.sum(numbers) / ranks.world_size).tolist()
    return found
