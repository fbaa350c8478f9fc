"""Engines with each option: what they learn, what a save gives back; memory beside the planner's; preflight."""

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from model.batch import Batch
from pretrain.checkpoint import checkpoint
from pretrain.config.schema import Config, load
from pretrain.engine.distributed import Ranks, join
from pretrain.engine.engine import Engine
from pretrain.engine.sequence import Ulysses
from pretrain.planning.memory import memory
from pretrain.preflight import node
from pretrain.preflight.exchange import Exchange, Place
from pretrain.preflight.verdict import Report
from tests.distributed import memory_cases
from tests.distributed.cases import make_engine, save
from tests.distributed.test_memory import CASES, MORE, Case, arguments
from tests.gpu.setting import Row, Setting, each

SIZE = ["model.layers=2", "model.width=64", "model.heads=2", "model.context=32", "model.vocab_size=64"]
PLAIN = [*SIZE, "batch.tokens=256", "batch.micro_batch=4", "engine.zero_stage=1", "engine.precision=fp32"]
OPTIONS: dict[str, tuple[float, list[str]]] = {
    "stage 0": (1e-4, ["engine.zero_stage=0"]),
    "stage 2": (1e-4, ["engine.zero_stage=2"]),
    "stage 3": (1e-4, ["engine.zero_stage=3"]),
    "activation checkpointing": (1e-4, ["engine.activation_checkpointing=true"]),
    "offload, stage 2": (1e-4, ["engine.offload=cpu", "engine.zero_stage=2"]),
    "offload, stage 3": (1e-4, ["engine.offload=cpu", "engine.zero_stage=3"]),
    "bf16": (0.02, ["engine.precision=bf16"]),
    "bf16, stage 3": (0.02, ["engine.precision=bf16", "engine.zero_stage=3"]),
    "fp16": (0.1, ["engine.precision=fp16"]),
    "AdamW in 8 bits": (0.02, ["optimizer.kind=adamw8bit"]),
    "Muon": (0.5, ["optimizer.kind=muon", "optimizer.clip=0", "engine.precision=bf16", "engine.zero_stage=2"]),
}
"""How far the losses may be from AdamW's in fp32 at stage 1: rounding, of 32, 16 or 8 bits, or another optimizer, or
in fp16 a step that is skipped until the loss is scaled as it should be."""
STEPS = 6


def options(setting: Setting) -> Iterator[Row]:
    with join(timeout_minutes=2) as ranks:
        wanted = losses(make_engine(ranks, load(PLAIN)), load(PLAIN), setting.device)
        yield from each({name: partial(_option, setting, ranks, name, wanted) for name in OPTIONS})
        yield from each({"exchange": partial(_shared_rows, setting, ranks)})


def _shared_rows(setting: Setting, ranks: Ranks) -> Iterator[Row]:
    """What sequence parallelism exchanges, of one rank with itself: queries in groups, and the way back."""
    exchange = Ulysses(ranks)
    query, key = (torch.randn(2, 8, heads, 16, device=setting.device, requires_grad=True) for heads in (4, 2))
    found = [exchange.positions(x) for x in exchange.heads(query, key)]
    gradients = torch.autograd.grad(found, (query, key), [2 * query, 3 * key])
    pairs = zip((*found, *gradients), (query, key, 2 * query, 3 * key), strict=True)
    differ = sum(int((one != other).sum()) for one, other in pairs)
    yield Row("sequence parallelism of one rank: elements that come back otherwise", differ, 0.0)


def _option(setting: Setting, ranks: Ranks, name: str, wanted: Tensor) -> Iterator[Row]:
    limit, more = OPTIONS[name]
    config = load([*PLAIN, *more])
    if name == "fp16" and setting.tiny:
        yield Row("fp16: refused on a CPU", float(_is_refused(ranks, config)), 1.0, at_least=True)
        return
    engine = make_engine(ranks, config)
    apart = (losses(engine, config, setting.device) / wanted - 1).abs().max()
    yield Row(f"{name}: losses of {STEPS} steps apart", float(apart), limit)
    root = setting.folder / name.replace(" ", "-")
    save(engine, root, STEPS, ranks)
    fresh = make_engine(ranks, config, seed=9)
    found = checkpoint.newest(root, ranks, print)
    assert found is not None, f"no checkpoint in {root}"
    found.load(fresh)
    yield Row(f"{name}: tensors that a checkpoint gives back otherwise", float(_different(engine, fresh)), 0.0)


def _is_refused(ranks: Ranks, config: Config) -> bool:
    try:
        make_engine(ranks, config)
    except ConfigError:
        return True
    return False


def _different(one: Engine, other: Engine) -> int:
    pairs = zip(one.owned_fragments(), other.owned_fragments(), strict=True)
    return sum(not torch.equal(a.states[state], b.states[state]) for a, b in pairs for state in a.states)


def losses(engine: Engine, config: Config, device: str) -> Tensor:
    """[STEPS], fp64, of steps on the same tokens, so that they fall."""
    found = []
    for step in range(1, STEPS + 1):
        metrics, _, _ = engine.train_step(batches(config, step, device), 3e-3)
        found.append(torch.stack([m["cross_entropy"].double() for m in metrics]).mean())
    return torch.stack(found).cpu()


def batches(config: Config, step: int, device: str) -> list[Batch]:
    """A step's micro-batches on one rank."""
    micro_batch, number = config.micro_batches(1)
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    shape = (number, micro_batch, config.model.context + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)
    at = torch.tensor(step, device=device)
    samples = torch.arange(number * micro_batch, device=device).view(number, -1)
    return [Batch(ids[:, :-1], ids[:, 1:], mine, at, 1) for ids, mine in zip(tokens, samples, strict=True)]


NEAR = 0.1
"""Of the planner's count of the allocator's peak."""


def peaks(setting: Setting) -> Iterator[Row]:
    """The planner's count beside the peak of torch's allocator, less what was allocated before the model was built; in
    a rehearsal beside what resident memory grows by, within the 15 % that are promised there."""
    alone = [case for case in [*CASES, *MORE] if case[1] == 1][: 1 if setting.tiny else None]
    with join(timeout_minutes=2) as ranks:
        yield from each({str(case): partial(_peak, setting, ranks, case) for case in alone})


def _peak(setting: Setting, ranks: Ranks, case: Case) -> Iterator[Row]:
    if setting.tiny:
        counted, measured, moment = memory_cases.growth(ranks, arguments(case))
    else:
        counted, measured, moment = allocated(ranks, arguments(case))
    note = f"counted {counted / 2**20:.0f} MiB ({moment}), measured {measured / 2**20:.0f} MiB"
    name = f"{case[0]}, ZeRO {case[2]}, {case[3]}, micro-batches of {case[4]}" + "".join(f", {x}" for x in case[6])
    yield Row(f"{name}: count off by", abs(counted / measured - 1), 0.15 if setting.tiny else NEAR, note=note)


def allocated(ranks: Ranks, args: list[str]) -> tuple[float, float, str]:
    """Counted bytes, the allocator's, and the moment that was counted for.

    A small engine has made a step before, so that the libraries have allocated what is theirs; engines of before are
    collected, so that none goes while this one is measured.
    """
    config, device = load(args), ranks.device
    losses(make_engine(ranks, load(PLAIN)), load(PLAIN), device.type)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    engine = make_engine(ranks, config)
    micro_batch, accumulation = config.micro_batches(1)
    for step in (1, 2):
        torch.cuda.reset_peak_memory_stats(device)
        made = [memory_cases.batch_of(config, micro_batch, step, device) for _ in range(accumulation)]
        engine.train_step(made, lr=1e-4)
    counted = memory(config, 1)
    return counted.total, torch.cuda.max_memory_allocated(device) - before, counted.moment


def preflight(setting: Setting) -> Iterator[Row]:
    """The matrix product of whole numbers, exact, and what a rank exchanges with itself: sums and clocks, no links."""
    yield from each({"matrix product": partial(_product, setting), "exchange": partial(_exchange, setting)})


def _product(setting: Setting) -> Iterator[Row]:
    [device] = node.devices(0, 1)[:1]
    assert device.type == setting.device, f"preflight looks at {device}"
    right, speed = node.multiply(device)
    yield Row("matrix product right", float(right), 1.0, at_least=True)
    yield Row("matrix product", speed / 1e3, unit="TFLOP/s")


def _exchange(setting: Setting) -> Iterator[Row]:
    report = Report(0, "here")
    said: list[Any] = []
    exchange = Exchange(report, Place(0, 1, 0, 1, "here"), lambda *step: said.append(step))
    with join(timeout_minutes=2):
        exchange.all_reduce()
        exchange.compare_clocks()
    yield Row("all-reduce with itself", report.all_reduce_gib_s or 0.0, unit="GiB/s")
    yield Row("findings of the exchange", len(report.findings), 0, note="; ".join(str(f) for f in report.findings))
