"""What masks and ordinary dropout cost a training step, beside a step without and beside their matrix products.

Forward and backward pass of 2,048 tokens of the parallel model at width 256, in turns, one thread, seconds of processor
time (the clock where there is CUDA); ratios of medians. Eager, and with compiled layers as `engine.compile` has them.
A row of masks says the ratio of times and, by `model/costs/flops.py`, that of products; its target is for the quotient
of the two in fp32 and for the ratio of times in bf16. Exits with 1 when a target is missed.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch

from model.architectures import registry
from model.architectures.registry import configure
from model.architectures.token_model import TokenModel
from model.batch import Batch
from model.config.model_config import ModelConfig
from model.costs.flops import training_flops_per_token
from pretrain.engine.hardware import keep_freed_memory
from pretrain.engine.layer_transforms import compile_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE: dict[str, Any] = {
    "architecture": "parallel_encoder_decoder",
    "layers": 2,
    "width": 256,
    "heads": 4,
    "context": 128,
    "vocab_size": 8192,
}
ROWS = 16
TURNS = 25
WARM_UP = 3
OFF = {"learned_dropout": {"enabled": False}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": OFF,
    "masks": {},
    "low-rank masks": {"learned_dropout": {"source": "low_rank"}},
    "dropout": {**OFF, "dropout": 0.1},
}
STEP = 1500
"""Penalties count from step 1,000 on."""


class Row(NamedTuple):
    """A claim."""

    name: str
    ratio: float
    target: float | None


TARGETS = {
    ("masks", "fp32", "eager"): 1.20,
    ("masks", "fp32", "compiled"): 1.10,
    ("masks", "bf16", "compiled"): 1.30,
    ("low-rank masks", "fp32", "eager"): 1.10,
    ("low-rank masks", "fp32", "compiled"): 1.10,
    ("low-rank masks", "bf16", "compiled"): 1.15,
    ("dropout", "fp32", "eager"): 1.08,
    ("dropout", "fp32", "compiled"): 1.08,
    ("dropout", "bf16", "eager"): 1.08,
    ("dropout", "bf16", "compiled"): 1.08,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--only", nargs="*", default=["fp32", "bf16", "eager", "compiled"], help="types and ways")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        keep_freed_memory(torch.device("cpu"))  # as the engine does
    rows = [
        row
        for dtype in ("fp32", "bf16")
        for way in ("eager", "compiled")
        if dtype in given.only and way in given.only
        for row in compare(dtype, way)
    ]
    if given.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        print("| medians | ratio | at most |\n|---|---|---|")
        for row in rows:
            print(f"| {row.name} | {row.ratio:.3f} | {row.target or '–'} |")
    return int(any(row.target and row.ratio > row.target for row in rows))


def compare(dtype: str, way: str) -> list[Row]:
    """A step of each kind, in turns."""
    configs = {
        kind: configure({"architecture": "parallel_encoder_decoder"} | SHAPE | made) for kind, made in KINDS.items()
    }
    models = {kind: build(config, dtype, way) for kind, config in configs.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    batch = batch_of()
    for turn in range(-WARM_UP, TURNS):
        for kind, model in models.items():
            since = now()
            model(batch).loss.backward()
            model.zero_grad(set_to_none=True)
            if turn >= 0:
                seconds[kind].append(now() - since)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    rows = []
    for kind in ("masks", "low-rank masks", "dropout"):
        ratio = medians[kind] / medians["plain"]
        flops = training_flops_per_token(configs[kind]) / training_flops_per_token(configs["plain"])
        name = f"{kind}, {dtype}, {way}: {1e3 * medians[kind]:.0f} ms / {1e3 * medians['plain']:.0f} ms"
        if kind != "dropout" and dtype == "fp32":
            name, ratio = f"{name} = {ratio:.2f}, by {flops:.2f} of the products", ratio / flops
        rows.append(Row(name, ratio, TARGETS.get((kind, dtype, way))))
    return rows


def build(config: ModelConfig, dtype: str, way: str) -> TokenModel:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = registry.build(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    if way == "compiled":
        compile_layers(model)
    return model.train()


def batch_of() -> Batch:
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, SHAPE["context"] + 1), device=DEVICE)
    samples = torch.arange(ROWS, device=DEVICE)
    return Batch(ids[:, :-1], ids[:, 1:], samples, torch.tensor(STEP, device=DEVICE), seed=0)


def now() -> float:
    """Seconds; other work on the machine does not count on a CPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
